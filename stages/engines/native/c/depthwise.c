/* Depthwise convolutions of any kernel, stride, dilation and padding, and their gradients. Weights lie [tap][channel];
 * lanes are channels. The usual kernels get loops of constant length. */
#include "vector.h"

/* Channels in blocks of four vectors, then single ones; where it may and one vector fits, the last overlaps the one
 * before it. */
#define BLOCKS(COUNT, OVERLAP, FOUR, ONE)                                                                                       \
    {                                                                                                                  \
        int c = 0;                                                                                                     \
        for (; c + 4 * VL <= (COUNT); c += 4 * VL) { FOUR }                                                            \
        for (; c < (COUNT); c += VL) {                                                                                 \
            if (OVERLAP && c + VL > (COUNT) && (COUNT) >= VL) c = (COUNT) - VL;                                                 \
            const int n = MIN(VL, (COUNT) - c);                                                                        \
            ONE                                                                                                        \
        }                                                                                                              \
    }

/* One output pixel, the first `C` channels: taps ky of rows that are there, columns k0..k1. flip: the columns' weights
 * in reverse. */
KERNEL depthwise_pixel(const struct et_step *s, et_taps rows, const float *w, const float *b, float *o, int ox,
                       const int C, const int flip) {
    const int left = ox * s->sw - s->pw;
    const int k0 = left >= 0 ? 0 : (-left + s->dw - 1) / s->dw;
    const int k1 = s->wi - 1 < left ? 0 : MIN(s->kw, (s->wi - 1 - left) / s->dw + 1);
#define EACH_TAP(BODY)                                                                                                 \
    for (int ky = 0; ky < s->kh; ky++)                                                                                 \
        if (rows[ky])                                                                                                  \
            for (int kx = k0; kx < k1; kx++) {                                                                         \
                const float *xp = rows[ky] + (ptrdiff_t)(left + kx * s->dw) * s->ldx + c;                              \
                const float *wp = w + (ptrdiff_t)(ky * s->kw + (flip ? s->kw - 1 - kx : kx)) * s->ci + c;              \
                BODY                                                                                                   \
            }
    BLOCKS(C, 1,
        vf a0 = vset(0); vf a1 = a0; vf a2 = a0; vf a3 = a0;
        if (b) { a0 = vld(b + c); a1 = vld(b + c + VL); a2 = vld(b + c + 2 * VL); a3 = vld(b + c + 3 * VL); }
        EACH_TAP(a0 += vld(xp) * vld(wp); a1 += vld(xp + VL) * vld(wp + VL); a2 += vld(xp + 2 * VL) * vld(wp + 2 * VL);
                 a3 += vld(xp + 3 * VL) * vld(wp + 3 * VL);)
        vst(o + c, vact(a0, s->act)); vst(o + c + VL, vact(a1, s->act));
        vst(o + c + 2 * VL, vact(a2, s->act)); vst(o + c + 3 * VL, vact(a3, s->act));,
        vf a = b ? get(b + c, n) : vset(0);
        EACH_TAP(a += get(xp, n) * get(wp, n);)
        put(o + c, n, vact(a, s->act));)
}

/* The pixels of a tile that are summed at once: a whole one, or half. */
#define TILE 8
#define HALF 4
#define FOR_TILE(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
#define FOR_HALF(F) F(0) F(1) F(2) F(3)

/* Output pixels lo..hi, at least HALF, all of whose columns are inside; the last tile overlaps the one before. */
INL void depthwise_inside(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y, int lo,
                          int hi, const int K, const int S, const int flip) {
    const int C = s->ci;
    const ptrdiff_t L = s->ldx;
#define TILE_INIT(r) vf a##r = start;
#define TILE_AT(r) const ptrdiff_t at##r = (r) * S * L; /* computed once: addresses cost as much as the sums */
#define TILE_MAC(r) a##r += LOAD(xp + at##r) * wv;
#define TILE_PUT(r) STORE(o + (ptrdiff_t)(r) * s->ldy, vact(a##r, s->act));
#define TILES(FOR, N)                                                                                                  \
    for (int next = lo; next < hi; next += N) {                                                                        \
        const int ox = MIN(next, hi - N);                                                                              \
        const vf start = b ? LOAD(b + c) : vset(0);                                                                    \
        FOR(TILE_INIT)                                                                                                 \
        for (int ky = 0; ky < s->kh; ky++)                                                                             \
            if (rows[ky]) {                                                                                            \
                const float *xp = rows[ky] + (ptrdiff_t)(ox * S - s->pw) * L + c, *wp = w + (ptrdiff_t)ky * K * C + c; \
                UNROLL for (int kx = 0; kx < K; kx++, xp += L) {                                                       \
                    const vf wv = LOAD(wp + (flip ? K - 1 - kx : kx) * C);                                             \
                    FOR(TILE_MAC)                                                                                      \
                }                                                                                                      \
            }                                                                                                          \
        float *o = y + (ptrdiff_t)ox * s->ldy + c;                                                                     \
        FOR(TILE_PUT)                                                                                                  \
    }
#define UNROLL _Pragma("GCC unroll 8")
    FOR_TILE(TILE_AT)
    const int whole = hi - lo >= TILE;
    int c = 0;
#define LOAD vld
#define STORE vst
    if (whole)
        for (; c + VL <= C; c += VL) TILES(FOR_TILE, TILE)
    else
        for (; c + VL <= C; c += VL) TILES(FOR_HALF, HALF)
#undef LOAD
#undef STORE
#undef UNROLL
    if (c == C) return;
    if (C >= VL) c = C - VL; /* the last vector overlaps the one before */
    const int n = MIN(VL, C - c);
#define UNROLL
#define LOAD(p) get(p, n)
#define STORE(p, v) put(p, n, v)
    if (whole) TILES(FOR_TILE, TILE)
    else TILES(FOR_HALF, HALF)
#undef LOAD
#undef STORE
#undef UNROLL
}

/* Four output pixels from ox (fewer at the end of the row), channels from c: columns outside of the map are left out. */
KERNEL depthwise_border(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y, int ox,
                        int end, int c, const int flip) {
    for (; c < s->ci; c += VL) {
        const int n = MIN(VL, s->ci - c), count = MIN(4, end - ox), left = ox * s->sw - s->pw;
        vf a0 = b ? get(b + c, n) : vset(0), a1 = a0, a2 = a0, a3 = a0;
        for (int ky = 0; ky < s->kh; ky++)
            if (rows[ky])
                for (int kx = 0; kx < s->kw; kx++) {
                    const vf wv = get(w + (ptrdiff_t)(ky * s->kw + (flip ? s->kw - 1 - kx : kx)) * s->ci + c, n);
                    const int i = left + kx * s->dw;
                    const float *xp = rows[ky] + c;
#define BORDER_MAC(r)                                                                                                  \
    if (i + r * s->sw >= 0 && i + r * s->sw < s->wi) a##r += get(xp + (ptrdiff_t)(i + r * s->sw) * s->ldx, n) * wv;
                    BORDER_MAC(0) BORDER_MAC(1) BORDER_MAC(2) BORDER_MAC(3)
                }
        float *o = y + (ptrdiff_t)ox * s->ldy + c;
        put(o, n, vact(a0, s->act));
        if (count > 1) put(o + s->ldy, n, vact(a1, s->act));
        if (count > 2) put(o + 2 * s->ldy, n, vact(a2, s->act));
        if (count > 3) put(o + 3 * s->ldy, n, vact(a3, s->act));
    }
}

/* Output pixels ox..end at the borders. */
KERNEL depthwise_borders(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y, int ox,
                         int end, const int flip) {
    const int wide = s->ci / (4 * VL) * (4 * VL);
    for (int i = ox; wide && i < end; i++)
        depthwise_pixel(s, rows, w, b, y + (ptrdiff_t)i * s->ldy, i, wide, flip);
    for (int i = ox; wide < s->ci && i < end; i += 4) depthwise_border(s, rows, w, b, y, i, end, wide, flip);
}

INL void depthwise_line(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y, const int K,
                        const int S, const int flip) {
    int lo = MIN((s->pw + S - 1) / S, s->wo), hi = s->wi - K + s->pw < 0 ? 0 : (s->wi - K + s->pw) / S + 1;
    hi = MIN(MAX(hi, lo), s->wo);
    if (hi - lo < HALF) {
        depthwise_borders(s, rows, w, b, y, 0, s->wo, flip);
        return;
    }
    depthwise_borders(s, rows, w, b, y, 0, lo, flip);
    depthwise_borders(s, rows, w, b, y, hi, s->wo, flip);
    depthwise_inside(s, rows, w, b, y, lo, hi, K, S, flip);
}

/* One output row: y[ox][c] = act(b[c] + sum over taps of x[tap's pixel][c] w[tap][c]). */
KERNEL depthwise_row(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y) {
    const int key = s->dw == 1 ? s->kw * 16 + s->sw : 0;
    switch (key) {
    case 3 * 16 + 1: depthwise_line(s, rows, w, b, y, 3, 1, 0); break;
    case 3 * 16 + 2: depthwise_line(s, rows, w, b, y, 3, 2, 0); break;
    case 5 * 16 + 1: depthwise_line(s, rows, w, b, y, 5, 1, 0); break;
    case 5 * 16 + 2: depthwise_line(s, rows, w, b, y, 5, 2, 0); break;
    case 7 * 16 + 1: depthwise_line(s, rows, w, b, y, 7, 1, 0); break;
    case 7 * 16 + 2: depthwise_line(s, rows, w, b, y, 7, 2, 0); break;
    default:
        depthwise_borders(s, rows, w, b, y, 0, s->wo, 0);
    }
}

/* dx[iy][ix][c] = add + sum over taps of g[oy][ox][c] w[tap][c]. g has ldy floats a pixel, dx ldx, add ldr. */
KERNEL depthwise_dx(const struct et_step *s, const float *g, const float *w, const float *add, float *dx) {
    const int C = s->ci;
    const int even = s->sw == 1 && s->dw == 1 && s->pw < s->kw && add != dx; /* then it is a convolution of g */
    struct et_step t = *s;
    t.wi = s->wo, t.wo = s->wi, t.pw = s->kw - 1 - s->pw, t.ldx = s->ldy, t.ldy = s->ldx, t.act = 0;
    for (int iy = 0; iy < s->hi; iy++) {
        const float *grow[ET_MAX_ROWS];
        for (int ky = 0; ky < s->kh; ky++) {
            const int t = iy + s->ph - ky * s->dh;
            grow[ky] = t >= 0 && t % s->sh == 0 && t / s->sh < s->ho ? g + (ptrdiff_t)(t / s->sh) * s->wo * s->ldy : 0;
        }
        if (even) {
            float *o = dx + (ptrdiff_t)iy * s->wi * s->ldx;
            const float *more = add ? add + (ptrdiff_t)iy * s->wi * s->ldr : 0;
            switch (s->kw) {
            case 3: depthwise_line(&t, grow, w, 0, o, 3, 1, 1); break;
            case 5: depthwise_line(&t, grow, w, 0, o, 5, 1, 1); break;
            case 7: depthwise_line(&t, grow, w, 0, o, 7, 1, 1); break;
            default: depthwise_borders(&t, grow, w, 0, o, 0, s->wi, 1);
            }
            for (int ix = 0; more && ix < s->wi; ix++, o += s->ldx, more += s->ldr)
                for (int c = 0; c < C; c++) o[c] += more[c];
            continue;
        }
        for (int ix = 0; ix < s->wi; ix++) {
            const ptrdiff_t pixel = (ptrdiff_t)iy * s->wi + ix;
            float *o = dx + pixel * s->ldx;
            const float *more = add ? add + pixel * s->ldr : 0;
            /* the columns that reach this one: kx, kx + every, ... */
            int from = 0, every = 1, end = s->kw;
            if (s->dw == 1) {
                every = s->sw, from = (ix + s->pw) % s->sw;
                const int most = ix + s->pw - (s->wo - 1) * s->sw;
                if (most > from) from = most;
                end = MIN(s->kw, ix + s->pw + 1);
            }
#define EACH_SOURCE(BODY)                                                                                              \
    for (int ky = 0; ky < s->kh; ky++)                                                                                 \
        if (grow[ky])                                                                                                  \
            for (int kx = from; kx < end; kx += every) {                                                               \
                const int t = ix + s->pw - kx * s->dw;                                                                 \
                if (s->dw > 1 && (t < 0 || t % s->sw || t / s->sw >= s->wo)) continue;                                 \
                const float *gp = grow[ky] + (ptrdiff_t)(t / s->sw) * s->ldy + c;                                      \
                const float *wp = w + (ptrdiff_t)(ky * s->kw + kx) * C + c;                                            \
                BODY                                                                                                   \
            }
            BLOCKS(C, !more, /* what is added may be dx itself */
                vf a0 = vset(0); vf a1 = a0; vf a2 = a0; vf a3 = a0;
                EACH_SOURCE(a0 += vld(gp) * vld(wp); a1 += vld(gp + VL) * vld(wp + VL);
                            a2 += vld(gp + 2 * VL) * vld(wp + 2 * VL); a3 += vld(gp + 3 * VL) * vld(wp + 3 * VL);)
                if (more) { a0 += vld(more + c); a1 += vld(more + c + VL); a2 += vld(more + c + 2 * VL); a3 += vld(more + c + 3 * VL); }
                vst(o + c, a0); vst(o + c + VL, a1); vst(o + c + 2 * VL, a2); vst(o + c + 3 * VL, a3);,
                vf a = vset(0);
                EACH_SOURCE(a += get(gp, n) * get(wp, n);)
                if (more) a += get(more + c, n);
                put(o + c, n, a);)
        }
    }
}

/* gw[tap][c] += sum over positions of g[oy][ox][c] x[iy][ix][c]. x has ldx floats a pixel, g ldy. */
KERNEL depthwise_dw(const struct et_step *s, const float *x, const float *g, float *gw) {
    const int C = s->ci;
    for (int ky = 0; ky < s->kh; ky++)
        for (int kx = 0; kx < s->kw; kx++, gw += C) {
            const int oy = ky * s->dh - s->ph, ox = kx * s->dw - s->pw;
            const int y0 = oy >= 0 ? 0 : (-oy + s->sh - 1) / s->sh, x0 = ox >= 0 ? 0 : (-ox + s->sw - 1) / s->sw;
            const int y1 = s->hi - 1 < oy ? 0 : MIN(s->ho, (s->hi - 1 - oy) / s->sh + 1);
            const int x1 = s->wi - 1 < ox ? 0 : MIN(s->wo, (s->wi - 1 - ox) / s->sw + 1);
#define EACH_PAIR(BODY)                                                                                                \
    for (int v = y0; v < y1; v++) {                                                                                    \
        const float *gp = g + ((ptrdiff_t)v * s->wo + x0) * s->ldy + c;                                                \
        const float *xp = x + ((ptrdiff_t)(v * s->sh + oy) * s->wi + x0 * s->sw + ox) * s->ldx + c;                    \
        for (int u = x0; u < x1; u++, gp += s->ldy, xp += (ptrdiff_t)s->sw * s->ldx) { BODY }                          \
    }
            int c = 0;
            for (; c + 4 * VL <= C; c += 4 * VL) {
                vf a0 = vset(0), a1 = a0, a2 = a0, a3 = a0;
                EACH_PAIR(a0 += vld(gp) * vld(xp); a1 += vld(gp + VL) * vld(xp + VL);
                          a2 += vld(gp + 2 * VL) * vld(xp + 2 * VL); a3 += vld(gp + 3 * VL) * vld(xp + 3 * VL);)
                vst(gw + c, vld(gw + c) + a0), vst(gw + c + VL, vld(gw + c + VL) + a1);
                vst(gw + c + 2 * VL, vld(gw + c + 2 * VL) + a2), vst(gw + c + 3 * VL, vld(gw + c + 3 * VL) + a3);
            }
            for (; c < C; c += VL) { /* no overlap: it would add twice */
                const int n = MIN(VL, C - c);
                vf a = vset(0);
                EACH_PAIR(a += get(gp, n) * get(xp, n);)
                put(gw + c, n, get(gw + c, n) + a);
            }
        }
}
