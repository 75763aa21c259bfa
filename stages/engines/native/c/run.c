/* Executes the steps of an image: whole maps, or chains of steps row by row through rings. */
#include "internal.h"

static void input_row(const struct et_net *net, const struct et_step *s, int row, float *y) {
    const size_t plane = (size_t)s->hi * (size_t)s->wi, width = (size_t)s->wi, channels = (size_t)s->ci;
    const size_t first = net->rows ? 0 : (size_t)row * width;
    const void *sample = net->rows ? net->rows(net->rows_user, row) : net->sample;
    if (net->input == ET_FLOAT_CHW) {
        const float *x = (const float *)sample + first;
        if (channels == 3)
            for (size_t i = 0; i < width; i++, y += s->ldy) y[0] = x[i], y[1] = x[i + plane], y[2] = x[i + 2 * plane];
        else
            for (size_t c = 0; c < channels; c++)
                for (size_t i = 0; i < width; i++) y[i * (size_t)s->ldy + c] = x[c * plane + i];
    } else if (net->input == ET_FLOAT_HWC) {
        const float *x = (const float *)sample + first * channels;
        for (size_t i = 0; i < width; i++) memcpy(y + i * (size_t)s->ldy, x + i * channels, channels * sizeof *x);
    } else {
        const uint8_t *x = (const uint8_t *)sample + first * channels;
        for (size_t i = 0; i < width; i++)
            for (size_t c = 0; c < channels; c++)
                y[i * (size_t)s->ldy + c] = (float)x[i * channels + c] * net->scale[c] + net->offset[c];
    }
}

/* Output row oy of a step, from the rows that its input holds. */
static void run_row(const struct et_net *net, const struct et_step *s, int oy) {
    const struct et_kernels *k = net->kernels;
    const float *x = et_at(net, s->x), *w = et_at(net, s->w), *b = et_at(net, s->b), *r = et_at(net, s->r);
    const float *rows[ET_MAX_ROWS];
    float *y = et_at(net, s->y) + (ptrdiff_t)(oy % s->yr) * s->wo * s->ldy;
    const int first = s->flags & ET_ADAPTIVE ? (int)((int64_t)oy * s->hi / s->ho) : oy * s->sh - s->ph;
    if (r) r += (ptrdiff_t)oy * s->wo * s->ldr;
    if (s->kind != ET_INPUT)
        for (int i = 0; i < s->kh; i++) {
            const int iy = first + i * s->dh;
            rows[i] = iy >= 0 && iy < s->hi ? x + (ptrdiff_t)(iy % s->xr) * s->wi * s->ldx : 0;
        }
    switch (s->kind) {
    case ET_INPUT: input_row(net, s, oy, y); break;
    case ET_CONV:
        if (s->n == 1) k->pointwise(s, rows[0], w, b, y, r, s->wo);
        else k->conv_row(s, rows, w, b, y, r, net->space[ET_CONSTANT]);
        break;
    case ET_DEPTHWISE: k->depthwise_row(s, rows, w, b, y); break;
    case ET_MAX_POOL: {
        const int end = s->flags & ET_ADAPTIVE ? (int)(((int64_t)(oy + 1) * s->hi + s->ho - 1) / s->ho) : s->hi;
        for (int i = 0; i < s->kh; i++)
            if (first + i * s->dh >= end) rows[i] = 0;
        uint8_t *index = (uint8_t *)et_at(net, s->m);
        if (index && net->saving) index += (ptrdiff_t)oy * s->wo * s->ci;
        else index = 0;
        k->max_pool_row(s, rows, y, index);
        break;
    }
    case ET_AVG_POOL: {
        const int end = s->flags & ET_ADAPTIVE ? (int)(((int64_t)(oy + 1) * s->hi + s->ho - 1) / s->ho) : s->hi;
        for (int i = 0; i < s->kh; i++)
            if (first + i >= end) rows[i] = 0;
        k->avg_pool_row(s, rows, y, oy);
        break;
    }
    case ET_UNARY: k->unary(s, rows[0], y, s->wo); break;
    case ET_ADD: k->add_row(s, rows[0], r, y, s->wo); break;
    case ET_COPY:
        for (int p = 0; p < s->wo; p++)
            memmove(y + (ptrdiff_t)p * s->ldy, rows[0] + (ptrdiff_t)p * s->ldx, sizeof(float) * (size_t)s->ci);
        break;
    default: break;
    }
}

/* Row oy of the last of `count` steps, and before it whatever rows of the others it needs. */
static void make_row(const struct et_net *net, const struct et_step *steps, int count, int *next, int oy) {
    const struct et_step *s = steps + count - 1;
    if (count > 1) {
        const int need = MIN(s->hi, oy * s->sh - s->ph + (s->kh - 1) * s->dh + 1);
        for (; next[count - 2] < need; next[count - 2]++) make_row(net, steps, count - 1, next, next[count - 2]);
    }
    run_row(net, s, oy);
}

static void run_chain(const struct et_net *net, const struct et_step *steps, int count) {
    int next[ET_MAX_STAGES] = {0};
    for (int oy = 0; oy < steps[count - 1].ho; oy++) make_row(net, steps, count, next, oy);
}

/* Pixels of channels to channels of pixels, or (n = 1) back; the p-th pixel of the latter is the index[p]-th of the former. */
static void transpose(const struct et_step *s, const float *x, const float *r, const int32_t *index, float *y) {
    enum { SIDE = 16 }; /* of the squares that both sides are walked in: each line of the cache is met once */
    const ptrdiff_t pixels = (ptrdiff_t)s->hi * s->wi, channels = s->ci;
    for (ptrdiff_t p0 = 0; p0 < pixels; p0 += SIDE)
        for (ptrdiff_t c0 = 0; c0 < channels; c0 += SIDE) {
            const ptrdiff_t p1 = MIN(pixels, p0 + SIDE), c1 = MIN(channels, c0 + SIDE);
            for (ptrdiff_t p = p0; p < p1; p++) {
                const ptrdiff_t at = index ? index[p] : p;
                if (!s->n)
                    for (ptrdiff_t c = c0; c < c1; c++) y[c * pixels + p] = x[at * s->ldx + c];
                else if (r)
                    for (ptrdiff_t c = c0; c < c1; c++) y[at * s->ldy + c] = x[c * pixels + p] + r[at * s->ldr + c];
                else
                    for (ptrdiff_t c = c0; c < c1; c++) y[at * s->ldy + c] = x[c * pixels + p];
            }
        }
}

static void fill(const struct et_step *s, float *y) {
    const float value = et_float(s->a0);
    for (ptrdiff_t p = 0; p < (ptrdiff_t)s->hi * s->wi; p++)
        for (int c = 0; c < s->ci; c++) y[p * s->ldy + c] = value;
}

static void merge(const struct et_step *s, const float *fixed, const float *live, const int32_t *index, float *y) {
    const size_t padded = ((size_t)s->co + 15) / 16 * 16;
    if (fixed) memcpy(y, fixed, padded * sizeof *y);
    else memset(y, 0, padded * sizeof *y);
    for (int i = 0; i < s->n; i++) y[index[i]] = live[i];
}

static void page(struct et_net *net, const struct et_step *s) {
    const int in = s->kind == ET_PAGE_IN;
    if (!net->page) net->lost = 1;
    if (!net->lost && net->page(net->page_user, in, (size_t)(uint32_t)s->a0, et_at(net, in ? s->y : s->x), (size_t)s->n))
        net->lost = 1;
}

static void run_step(struct et_net *net, const struct et_step *s) {
    const struct et_kernels *k = net->kernels;
    const float *x = et_at(net, s->x), *w = et_at(net, s->w), *b = et_at(net, s->b), *r = et_at(net, s->r);
    float *y = et_at(net, s->y), *m = et_at(net, s->m);
    const int32_t *index = (const int32_t *)(const void *)m;
    switch (s->kind) {
    case ET_CONV:
        if (s->n == 1) {
            k->pointwise(s, x, w, b, y, r, s->hi * s->wi);
            break;
        } /* fall through */
    case ET_INPUT: case ET_DEPTHWISE: case ET_MAX_POOL: case ET_AVG_POOL: case ET_COPY:
        for (int oy = 0; oy < s->ho; oy++) run_row(net, s, oy);
        break;
    case ET_UNARY: k->unary(s, x, y, s->hi * s->wi); break;
    case ET_ADD: k->add_row(s, x, r, y, s->hi * s->wi); break;
    case ET_MEAN: k->mean(s, x, y); break;
    case ET_TRANSPOSE: transpose(s, x, r, index, y); break;
    case ET_MATMUL: k->matmul(s, x, w, r, y); break;
    case ET_GRU: k->gru(s, x, r, w, y, m); break;
    case ET_GRU_DX: k->gru_dx(s, x, w, r, y, et_at(net, s->b), m); break;
    case ET_LSTM: k->lstm(s, x, r, w, y, m); break;
    case ET_LSTM_DX: k->lstm_dx(s, x, w, r, y, m); break;
    case ET_MERGE: merge(s, w, b, index, y); break;
    case ET_MASK: k->mask(x, (size_t)s->n, s->act, (uint32_t *)(void *)m); break;
    case ET_PACK: k->pack(s, x, net->seed, m); break;
    case ET_UNPACK: k->unpack(s, m, y); break;
    case ET_PAGE_OUT:
    case ET_PAGE_IN: page(net, s); break;
    case ET_MULTIPLY: k->multiply(s, x, r, w, y); break;
    case ET_DOT: k->dot(s, x, r, w, y); break;
    case ET_FILL: fill(s, y); break;
    case ET_SOFTMAX: k->softmax(s, x, y); break;
    case ET_SOFTMAX_DX: k->softmax_dx(s, x, w, r, y); break;
    case ET_NORM: k->norm(s, x, y, m); break;
    case ET_NORM_DX: k->norm_dx(s, x, w, r, y, m); break;
    case ET_NEAREST: k->nearest(s, x, y); break;
    case ET_GATHER: k->gather(s, x, index, w, r, y); break;
    case ET_SCATTER: k->scatter(s, x, index, w, r, y); break;
    case ET_AMAX: k->amax(s, x, y); break;
    case ET_AMAX_DX: k->amax_dx(s, x, b, w, r, y); break;
    case ET_NEAREST_DX: k->nearest_dx(s, x, r, y); break;
    case ET_FEATURES: for (int i = 0; i < s->n; i++) net->features[i] = x[index[i]]; break;
    case ET_GRADIENT_IN: for (int i = 0; i < s->n; i++) y[index[i]] = net->gradient[i]; break;
    case ET_MASK_BACK: k->mask_back(x, (size_t)s->n, (const uint32_t *)(const void *)m, y); break;
    case ET_CONV_DX: k->conv_dx(s, x, w, r, y, et_at(net, s->b)); break;
    case ET_CONV_DW: k->conv_dw(s, x, r, y); break;
    case ET_DEPTHWISE_DX: k->depthwise_dx(s, x, w, r, y); break;
    case ET_DEPTHWISE_DW: k->depthwise_dw(s, x, r, y); break;
    case ET_BIAS_DW: k->bias_dw(s, x, index, y); break;
    case ET_MAX_POOL_DX: k->max_pool_dx(s, x, (const uint8_t *)m, r, y); break;
    case ET_AVG_POOL_DX: k->avg_pool_dx(s, x, r, y); break;
    case ET_MEAN_DX: k->mean_dx(s, x, r, y); break;
    case ET_UNARY_DX: k->unary_dx(s, x, w, r, y); break;
    default: break;
    }
}

/* A step that adds to the gradients, and the update that they are for: the layer's weights are read no more. */
static void run_update(struct et_net *net, const struct et_step *s) {
    const uint32_t first = s->y & 0x3fffffffu, count = et_piece(s);
    struct et_step alone = *s;
    alone.y = (uint32_t)ET_GRADIENT << 30;
    memset(net->space[ET_GRADIENT], 0, (size_t)count * 4);
    run_step(net, &alone);
    net->update(net->update_user, net->space[ET_LIVE] + first, net->space[ET_GRADIENT], first, count);
}

static void run(struct et_net *net, uint32_t first, uint32_t count) {
    for (uint32_t i = first; i < first + count; i++) {
        const struct et_step *s = net->steps + i;
        const int turn = (s->flags & ET_TURNS) >> 8;
        if (turn && net->turn && turn != net->turn) continue;
        if (s->kind == ET_CHAIN) {
            run_chain(net, s + 1, s->n);
            i += (uint32_t)s->n;
        } else if (net->update && et_piece(s))
            run_update(net, s);
        else if (net->saving || !(s->flags & ET_SAVING))
            run_step(net, s);
    }
}

/* The boundary's values, between the arena and one array behind the other. */
static void carry_boundary(const struct et_net *net, const float *in, float *out) {
    for (uint32_t i = 0; i < net->header->boundaries; i++) {
        const struct et_part *part = net->parts + i;
        if (in) memcpy(net->space[ET_ARENA] + part->at, in, (size_t)part->length * 4), in += part->length;
        if (out) memcpy(out, net->space[ET_ARENA] + part->at, (size_t)part->length * 4), out += part->length;
    }
}

int et_prefix(struct et_net *net, const void *sample, float *boundary) {
    if (!sample == !net->rows) return ET_BAD_ARGUMENT;
    net->sample = sample, net->saving = 0;
    run(net, 0, net->header->prefix);
    carry_boundary(net, 0, boundary);
    return ET_OK;
}

static int suffix(struct et_net *net, const float *boundary, float *features, int saving) {
    if (!features) return ET_BAD_ARGUMENT;
    if (saving && net->pages && !net->page) return ET_BAD_ARGUMENT;
    net->features = features, net->saving = saving, net->lost = 0;
    carry_boundary(net, boundary, 0);
    run(net, net->header->prefix, net->header->suffix);
    return net->lost ? ET_LOST_PAGE : ET_OK;
}
int et_suffix(struct et_net *net, const float *boundary, float *features) { return suffix(net, boundary, features, 0); }
int et_forward(struct et_net *net, const float *boundary, float *features) { return suffix(net, boundary, features, 1); }

int et_backward(struct et_net *net, const float *gradient) {
    if (!gradient || ((net->header->live || net->header->sums) && !net->space[ET_GRADIENT])) return ET_BAD_ARGUMENT;
    net->gradient = gradient, net->saving = 1;
    if (net->pages && !net->page) return ET_BAD_ARGUMENT;
    run(net, net->header->prefix + net->header->suffix, net->header->backward);
    return net->lost ? ET_LOST_PAGE : ET_OK;
}

int et_set_turn(struct et_net *net, int turn) {
    if (turn < 0 || turn > ET_TURNS >> 8) return ET_BAD_ARGUMENT;
    net->turn = turn;
    return ET_OK;
}

int et_set_pager(struct et_net *net, et_page *page, void *user) {
    net->page = page, net->page_user = user;
    return ET_OK;
}

void et_set_seed(struct et_net *net, uint32_t seed) { net->seed = seed; }

int et_run(struct et_net *net, uint32_t first, uint32_t count) {
    const uint32_t steps = net->header->prefix + net->header->suffix + net->header->backward;
    uint32_t at = 0;
    while (at < first && at < steps) at += net->steps[at].kind == ET_CHAIN ? 1 + (uint32_t)net->steps[at].n : 1;
    if (!net->sample || !net->features || !net->gradient || at != first || count > steps - first ||
        (net->pages && !net->page))
        return ET_BAD_ARGUMENT;
    net->saving = 1;
    run(net, first, count);
    return ET_OK;
}
