/* What a step may read and write: every reference with its extent, checked once when an image is opened. */
#include "internal.h"

#define MOST ((uint64_t)1 << 30)

enum { ANY = 0, READ = 1, FIXED = 2, WRITE = 4, SUMS = 8 }; /* which spaces a reference may name */

struct limits { uint64_t size[4]; };

static uint64_t times(uint64_t a, uint64_t b) { return a && b > MOST / a ? MOST + 1 : a * b; }

/* Floats from the first to the last value of `pixels` pixels that lie `apart`, with `channels` values each. */
static uint64_t extent(uint64_t pixels, uint64_t apart, uint64_t channels) {
    return pixels ? times(pixels - 1, apart) + channels : 0;
}

static int within(const struct limits *l, uint32_t reference, uint64_t length, int how) {
    const unsigned space = reference >> 30;
    const int allowed = space == ET_ARENA ? how != SUMS && how != FIXED : space == ET_CONSTANT ? how == READ || how == FIXED
                        : space == ET_LIVE ? how == READ : how == SUMS;
    return allowed && (reference & 0x3fffffffu) + length <= l->size[space];
}

static int maybe(const struct limits *l, uint32_t reference, uint64_t length, int how) {
    return reference == ET_NONE || within(l, reference, length, how);
}

static int indices(const struct limits *l, const float *constants, uint32_t reference, int32_t n, int32_t below) {
    if (n < 0 || n > below || !within(l, reference, (uint64_t)n, FIXED)) return 0;
    const float *at = constants + (reference & 0x3fffffffu);
    for (int32_t i = 0; i < n; i++) {
        int32_t index;
        memcpy(&index, at + i, sizeof index);
        if (index < 0 || index >= below) return 0;
    }
    return 1;
}

/* A table of places below a number, or -1. */
static int numbers(const struct limits *l, const float *constants, uint32_t reference, uint64_t count, int32_t below) {
    if (count > MOST || !within(l, reference, count, FIXED)) return 0;
    const float *at = constants + (reference & 0x3fffffffu);
    for (uint64_t i = 0; i < count; i++) {
        int32_t place;
        memcpy(&place, at + i, sizeof place);
        if (place < -1 || place >= below) return 0;
    }
    return 1;
}

static int between(int32_t value, int32_t low, int32_t high) { return value >= low && value <= high; }

static int sane(const struct et_step *s) {
    const int32_t dim = 1 << 18, wide = 1 << 24;
    return between(s->ci, 1, wide) && between(s->co, 1, wide) && between(s->ldx, 1, wide) && between(s->ldy, 1, wide) &&
           between(s->ldr, 0, wide) && between(s->hi, 1, dim) && between(s->wi, 1, dim) && between(s->ho, 1, dim) &&
           between(s->wo, 1, dim) && between(s->kh, 1, ET_MAX_ROWS) && between(s->kw, 1, 1 << 15) &&
           between(s->sh, 1, 4096) && between(s->sw, 1, 4096) && between(s->ph, 0, 1 << 15) &&
           between(s->pw, 0, 1 << 15) && between(s->dh, 1, 4096) && between(s->dw, 1, 4096) &&
           between(s->act, 0, ET_ACTIVATIONS - 1) && between(s->act2, 0, ET_RELU6) && between(s->xr, 1, s->hi) &&
           between(s->yr, 1, s->ho) && (s->flags & ~ET_FLAGS) == 0 && (!(s->flags & ET_TURNS) || et_piece(s));
}

static uint64_t panels(const struct et_step *s) {
    const uint64_t taps = (uint64_t)s->kh * (uint64_t)s->kw, padded = ((uint64_t)s->co + 15) / 16 * 16;
    return times(times(taps, (uint64_t)s->ci), padded);
}

static int same_map(const struct et_step *s) { return s->hi == s->ho && s->wi == s->wo; }

static int plain(const struct et_step *s) {
    return s->kh == 1 && s->kw == 1 && s->sh == 1 && s->sw == 1 && s->ph == 0 && s->pw == 0 && same_map(s);
}

static int check(const struct limits *l, const struct et_header *h, const float *constants, const struct et_step *s) {
    if (!sane(s)) return ET_BAD_STEP;
    const uint64_t ci = (uint64_t)s->ci, co = (uint64_t)s->co, co16 = (co + 15) / 16 * 16;
    const uint64_t in = times((uint64_t)s->hi, (uint64_t)s->wi), out = times((uint64_t)s->ho, (uint64_t)s->wo);
    const uint64_t xs = times((uint64_t)s->xr, (uint64_t)s->wi), ys = times((uint64_t)s->yr, (uint64_t)s->wo);
    const uint64_t ldx = (uint64_t)s->ldx, ldy = (uint64_t)s->ldy, ldr = (uint64_t)s->ldr, n = (uint64_t)s->n;
    const uint64_t taps = (uint64_t)s->kh * (uint64_t)s->kw, count = times(in, ci);
    const int relu = s->act <= ET_RELU6, pointwise = s->n == 1;
    int fits = 0;
    switch (s->kind) {
    case ET_INPUT:
        fits = s->ci == (int32_t)h->input_channels && s->hi == (int32_t)h->input_height &&
               s->wi == (int32_t)h->input_width && plain(s) && within(l, s->y, extent(ys, ldy, ci), WRITE);
        break;
    case ET_CONV:
        fits = relu && between(s->n, 0, 1) && (!pointwise || plain(s)) && (pointwise || ci <= h->zeros) &&
               within(l, s->x, extent(xs, ldx, ci), READ) && within(l, s->y, extent(ys, ldy, co), WRITE) &&
               within(l, s->w, panels(s), READ) && maybe(l, s->b, co16, READ) &&
               maybe(l, s->r, extent(out, ldr, co), READ);
        break;
    case ET_DEPTHWISE:
        fits = relu && ci == co && within(l, s->x, extent(xs, ldx, ci), READ) &&
               within(l, s->y, extent(ys, ldy, co), WRITE) && within(l, s->w, times(taps, ci), READ) &&
               maybe(l, s->b, ci, READ);
        break;
    case ET_MAX_POOL:
        fits = ci == co && taps <= 256 && within(l, s->x, extent(xs, ldx, ci), READ) &&
               within(l, s->y, extent(ys, ldy, co), WRITE) && maybe(l, s->m, (times(out, ci) + 3) / 4, WRITE);
        break;
    case ET_AVG_POOL:
        fits = ci == co && within(l, s->x, extent(xs, ldx, ci), READ) && within(l, s->y, extent(ys, ldy, co), WRITE);
        break;
    case ET_MEAN:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->y, ci, WRITE) && s->xr == s->hi;
        break;
    case ET_UNARY:
    case ET_COPY:
        fits = plain(s) && within(l, s->x, extent(xs, ldx, ci), READ) && within(l, s->y, extent(ys, ldy, ci), WRITE);
        break;
    case ET_ADD:
        fits = relu && plain(s) && between(s->n, 0, 1) && within(l, s->x, extent(xs, ldx, ci), READ) &&
               within(l, s->r, extent(in, ldr, ci), READ) && within(l, s->y, extent(ys, ldy, ci), WRITE);
        break;
    case ET_TRANSPOSE:
        fits = between(s->n, 0, 1) && within(l, s->x, s->n ? count : extent(in, ldx, ci), READ) &&
               within(l, s->y, s->n ? extent(in, ldy, ci) : count, WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ) &&
               (s->m == ET_NONE || (in <= MOST && indices(l, constants, s->m, (int32_t)in, (int32_t)in)));
        break;
    case ET_MATMUL:
        fits = between(s->n, 0, 1) && within(l, s->x, pointwise ? extent(ci, ldx, in) : extent(in, ldx, ci), READ) &&
               within(l, s->w, times(ci, co), READ) && within(l, s->y, extent(in, ldy, co), WRITE) &&
               maybe(l, s->r, extent(in, ldr, co), READ);
        break;
    case ET_GRU:
    case ET_LSTM: {
        const uint64_t gates = s->kind == ET_GRU ? 3 : 4, kept = s->kind == ET_GRU ? 4 : 6;
        fits = within(l, s->x, gates * ci, READ) && within(l, s->r, gates * ci, READ) && within(l, s->w, ci, READ) &&
               within(l, s->y, ci, WRITE) && within(l, s->m, kept * ci, WRITE);
        break;
    }
    case ET_GRU_DX:
        fits = within(l, s->x, 4 * ci, READ) && within(l, s->w, ci, READ) && within(l, s->r, ci, READ) &&
               within(l, s->y, 3 * ci, WRITE) && within(l, s->b, 3 * ci, WRITE) && within(l, s->m, ci, WRITE);
        break;
    case ET_LSTM_DX:
        fits = between(s->n, 0, 1) && within(l, s->x, 6 * ci, READ) && within(l, s->w, ci, READ) &&
               within(l, s->r, ci, READ) && within(l, s->y, 4 * ci, WRITE) && within(l, s->m, ci, WRITE);
        break;
    case ET_MERGE:
        fits = maybe(l, s->w, co16, FIXED) && within(l, s->b, n, READ) && within(l, s->y, co16, WRITE) &&
               indices(l, constants, s->m, s->n, s->co);
        break;
    case ET_MASK:
    case ET_MASK_BACK:
        fits = relu && s->n >= 1 && n <= MOST && within(l, s->x, n, READ) && within(l, s->m, (n + 511) / 512 * 16, WRITE) &&
               (s->kind == ET_MASK || within(l, s->y, n, WRITE));
        break;
    case ET_PACK:
    case ET_UNPACK: {
        const uint64_t words = 2 + (times(n, ci) + 31) / 32;
        fits = (s->ci == 8 || s->ci == 16) && s->n >= 1 && n <= MOST && within(l, s->m, words, WRITE) &&
               within(l, s->kind == ET_PACK ? s->x : s->y, n, s->kind == ET_PACK ? READ : WRITE);
        break;
    }
    case ET_PAGE_OUT:
    case ET_PAGE_IN:
        fits = s->n >= 1 && n <= MOST && s->a0 >= 0 && (uint64_t)s->a0 + n <= MOST &&
               within(l, s->kind == ET_PAGE_OUT ? s->x : s->y, n, s->kind == ET_PAGE_OUT ? READ : WRITE);
        break;
    case ET_MULTIPLY:
        fits = plain(s) && between(s->n, 0, 1) && within(l, s->x, extent(in, ldx, ci), READ) &&
               within(l, s->r, extent(in, ldr, ci), READ) && within(l, s->y, extent(in, ldy, ci), WRITE) &&
               maybe(l, s->w, extent(in, ldy, ci), READ);
        break;
    case ET_DOT:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->r, extent(in, ldr, ci), READ) &&
               (within(l, s->y, ci, WRITE) || within(l, s->y, ci, SUMS)) && maybe(l, s->w, ci, READ);
        break;
    case ET_GATHER:
    case ET_SCATTER: {
        const uint64_t places = times(n, co), read = s->kind == ET_GATHER ? ci : n, made = s->kind == ET_GATHER ? n : ci;
        fits = s->n >= 1 && within(l, s->x, read, READ) && within(l, s->y, made, WRITE) && maybe(l, s->r, made, READ) &&
               maybe(l, s->w, places, FIXED) && numbers(l, constants, s->m, places, s->ci);
        break;
    }
    case ET_AMAX:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->y, ci, WRITE);
        break;
    case ET_AMAX_DX:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->b, ci, READ) && within(l, s->w, ci, READ) &&
               within(l, s->y, extent(in, ldy, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_FILL:
        fits = within(l, s->y, extent(in, ldy, ci), WRITE);
        break;
    case ET_SOFTMAX:
        fits = plain(s) && between(s->n, 0, 1) && within(l, s->x, extent(in, ldx, ci), READ) &&
               within(l, s->y, extent(in, ldy, ci), WRITE);
        break;
    case ET_NORM:
        fits = plain(s) && s->n >= 1 && s->ci % s->n == 0 && within(l, s->x, extent(in, ldx, ci), READ) &&
               within(l, s->y, extent(in, ldy, ci), WRITE) && within(l, s->m, 4 * ci, WRITE);
        break;
    case ET_SOFTMAX_DX:
    case ET_NORM_DX:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->w, extent(in, ldy, ci), READ) &&
               within(l, s->y, extent(in, ldy, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ) &&
               (s->kind == ET_SOFTMAX_DX ? between(s->n, 0, 1)
                                         : s->n >= 1 && s->ci % s->n == 0 && within(l, s->m, 4 * ci, WRITE));
        break;
    case ET_NEAREST:
        fits = ci == co && within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->y, extent(out, ldy, ci), WRITE);
        break;
    case ET_NEAREST_DX:
        fits = ci == co && within(l, s->x, extent(out, ldy, ci), READ) &&
               within(l, s->y, extent(in, ldx, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_FEATURES:
    case ET_GRADIENT_IN:
        fits = ci == h->features && s->n == s->ci && indices(l, constants, s->m, s->n, s->ci) &&
               within(l, s->kind == ET_FEATURES ? s->x : s->y, ci, WRITE);
        break;
    case ET_CONV_DX:
        fits = between(s->n, 0, 1) && (!pointwise || plain(s)) && within(l, s->x, extent(out, ldy, co), READ) &&
               within(l, s->w, panels(s), READ) && within(l, s->y, extent(in, ldx, ci), WRITE) &&
               maybe(l, s->r, extent(in, ldr, ci), READ) && within(l, s->b, times(co, ET_CHUNK), WRITE);
        break;
    case ET_CONV_DW:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->r, extent(out, ldy, co), READ) &&
               within(l, s->y, panels(s), SUMS);
        break;
    case ET_DEPTHWISE_DX:
        fits = ci == co && within(l, s->x, extent(out, ldy, ci), READ) && within(l, s->w, times(taps, ci), READ) &&
               within(l, s->y, extent(in, ldx, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_DEPTHWISE_DW:
        fits = ci == co && within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->r, extent(out, ldy, ci), READ) &&
               within(l, s->y, times(taps, ci), SUMS);
        break;
    case ET_BIAS_DW:
        fits = within(l, s->x, extent(out, ldy, co), READ) && within(l, s->y, n, SUMS) &&
               indices(l, constants, s->m, s->n, s->co);
        break;
    case ET_MAX_POOL_DX:
        fits = ci == co && taps <= 256 && within(l, s->x, extent(out, ldy, ci), READ) &&
               within(l, s->m, (times(out, ci) + 3) / 4, READ) && within(l, s->y, extent(in, ldx, ci), WRITE) &&
               maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_AVG_POOL_DX:
        fits = ci == co && within(l, s->x, extent(out, ldy, ci), READ) &&
               within(l, s->y, extent(in, ldx, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_MEAN_DX:
        fits = within(l, s->x, ci, READ) && within(l, s->y, extent(in, ldx, ci), WRITE) &&
               maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    case ET_UNARY_DX:
        fits = within(l, s->x, extent(in, ldx, ci), READ) && within(l, s->w, extent(in, ldy, ci), READ) &&
               within(l, s->y, extent(in, ldy, ci), WRITE) && maybe(l, s->r, extent(in, ldr, ci), READ);
        break;
    default:
        return ET_UNSUPPORTED;
    }
    return fits ? ET_OK : ET_BAD_STEP;
}

/* Floats that a step adds to the gradients, and not to the sums behind them; 0 for any other. */
uint32_t et_piece(const struct et_step *s) {
    if (s->y == ET_NONE || s->y >> 30 != ET_GRADIENT) return 0;
    if (s->kind == ET_CONV_DW) return (uint32_t)panels(s);
    if (s->kind == ET_DEPTHWISE_DW) return (uint32_t)s->kh * (uint32_t)s->kw * (uint32_t)s->ci;
    return s->kind == ET_BIAS_DW ? (uint32_t)s->n : 0;
}

static int is_row_kind(int32_t kind) {
    return kind == ET_INPUT || kind == ET_CONV || kind == ET_DEPTHWISE || kind == ET_MAX_POOL || kind == ET_AVG_POOL ||
           kind == ET_UNARY || kind == ET_ADD || kind == ET_COPY;
}

/* Rows of its input that one output row of a step needs at once. */
static int window_rows(const struct et_step *s) { return (s->kh - 1) * s->dh + 1; }

/* A chain's steps each read the one before, in rings that hold enough rows; all but the last keep to their ring. */
static int check_chain(const struct et_step *s, int n) {
    for (int i = 0; i < n; i++) {
        if (!is_row_kind(s[i].kind) || (s[i].flags & ET_ADAPTIVE)) return ET_BAD_STEP;
        if (i && (s[i].x != s[i - 1].y || s[i].xr != s[i - 1].yr || s[i].hi != s[i - 1].ho || s[i].wi != s[i - 1].wo ||
                  s[i].ldx != s[i - 1].ldy || s[i].xr < MIN(s[i].hi, window_rows(s + i))))
            return ET_BAD_STEP;
        if (i && s[i].kind == ET_INPUT) return ET_BAD_STEP;
    }
    return ET_OK;
}

/* Outside of chains a step holds whole maps. */
static int whole(const struct et_step *s) { return s->xr == s->hi && s->yr == s->ho; }

int et_check_steps(const struct et_header *h, const struct et_step *steps, const float *constants) {
    const struct limits l = {{h->arena, h->constants, h->live, (uint64_t)h->live + h->sums}};
    const uint32_t ends[3] = {h->prefix, h->prefix + h->suffix, h->steps};
    uint32_t i = 0;
    for (int part = 0; part < 3; part++)
        while (i < ends[part]) {
            const struct et_step *s = steps + i++;
            uint32_t stages = 0;
            int code;
            if (s->kind == ET_CHAIN) {
                if (!between(s->n, 1, ET_MAX_STAGES) || (uint32_t)s->n > ends[part] - i) return ET_BAD_STEP;
                stages = (uint32_t)s->n;
                for (uint32_t k = 0; k < stages; k++)
                    if ((code = check(&l, h, constants, s + 1 + k))) return code;
                if ((code = check_chain(s + 1, s->n))) return code;
            } else {
                if ((code = check(&l, h, constants, s))) return code;
                if (!whole(s)) return ET_BAD_STEP;
            }
            if (part != 2 && s->kind >= ET_GRADIENT_IN) return ET_BAD_STEP;
            i += stages;
        }
    return ET_OK;
}
