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

/* One output pixel: taps ky of rows that are there, columns k0..k1. */
INL void depthwise_pixel(const struct et_step *s, et_rows rows, const float *w, const float *b, float *o, int ox) {
    const int left = ox * s->sw - s->pw, C = s->ci;
    const int k0 = left >= 0 ? 0 : (-left + s->dw - 1) / s->dw;
    const int k1 = s->wi - 1 < left ? 0 : MIN(s->kw, (s->wi - 1 - left) / s->dw + 1);
#define EACH_TAP(BODY)                                                                                                 \
    for (int ky = 0; ky < s->kh; ky++)                                                                                 \
        if (rows[ky])                                                                                                  \
            for (int kx = k0; kx < k1; kx++) {                                                                         \
                const float *xp = rows[ky] + (ptrdiff_t)(left + kx * s->dw) * s->ldx + c;                              \
                const float *wp = w + (ptrdiff_t)(ky * s->kw + kx) * C + c;                                            \
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

/* Output pixels lo..hi, a multiple of four, all of whose columns are inside. */
INL void depthwise_inside(const struct et_step *s, et_rows rows, const float *w, const float *b, float *y, int lo,
                          int hi, const int K, const int S) {
    const int C = s->ci, L = s->ldx;
    for (int c = 0; c < C; c += VL) {
        if (c + VL > C && C >= VL) c = C - VL;
        const int n = MIN(VL, C - c);
        for (int ox = lo; ox < hi; ox += 4) {
            vf a0 = b ? get(b + c, n) : vset(0), a1 = a0, a2 = a0, a3 = a0;
            for (int ky = 0; ky < s->kh; ky++)
                if (rows[ky]) {
                    const float *xp = rows[ky] + (ptrdiff_t)(ox * S - s->pw) * L + c, *wp = w + (ptrdiff_t)ky * K * C + c;
                    if (n == VL) {
#pragma GCC unroll 8
                        for (int kx = 0; kx < K; kx++) {
                            const vf wv = vld(wp + kx * C);
                            a0 += vld(xp + kx * L) * wv, a1 += vld(xp + (kx + S) * L) * wv;
                            a2 += vld(xp + (kx + 2 * S) * L) * wv, a3 += vld(xp + (kx + 3 * S) * L) * wv;
                        }
                    } else
                        for (int kx = 0; kx < K; kx++) {
                            const vf wv = get(wp + kx * C, n);
                            a0 += get(xp + kx * L, n) * wv, a1 += get(xp + (kx + S) * L, n) * wv;
                            a2 += get(xp + (kx + 2 * S) * L, n) * wv, a3 += get(xp + (kx + 3 * S) * L, n) * wv;
                        }
                }
            float *o = y + (ptrdiff_t)ox * s->ldy + c;
            put(o, n, vact(a0, s->act)), put(o + s->ldy, n, vact(a1, s->act));
            put(o + 2 * s->ldy, n, vact(a2, s->act)), put(o + 3 * s->ldy, n, vact(a3, s->act));
        }
    }
}

INL void depthwise_line(const struct et_step *s, et_rows rows, const float *w, const float *b, float *y, const int K,
                        const int S) {
    int lo = MIN((s->pw + S - 1) / S, s->wo), hi = s->wi - K + s->pw < 0 ? 0 : (s->wi - K + s->pw) / S + 1;
    hi = MIN(MAX(hi, lo), s->wo);
    const int tiled = lo + (hi - lo) / 4 * 4;
    for (int ox = 0; ox < s->wo; ox++) {
        if (ox == lo) ox = tiled;
        if (ox >= s->wo) break;
        depthwise_pixel(s, rows, w, b, y + (ptrdiff_t)ox * s->ldy, ox);
    }
    if (tiled > lo) depthwise_inside(s, rows, w, b, y, lo, tiled, K, S);
}

/* One output row: y[ox][c] = act(b[c] + sum over taps of x[tap's pixel][c] w[tap][c]). */
KERNEL depthwise_row(const struct et_step *s, et_rows rows, const float *w, const float *b, float *y) {
    const int key = s->dw == 1 ? s->kw * 16 + s->sw : 0;
    switch (key) {
    case 3 * 16 + 1: depthwise_line(s, rows, w, b, y, 3, 1); break;
    case 3 * 16 + 2: depthwise_line(s, rows, w, b, y, 3, 2); break;
    case 5 * 16 + 1: depthwise_line(s, rows, w, b, y, 5, 1); break;
    case 5 * 16 + 2: depthwise_line(s, rows, w, b, y, 5, 2); break;
    case 7 * 16 + 1: depthwise_line(s, rows, w, b, y, 7, 1); break;
    case 7 * 16 + 2: depthwise_line(s, rows, w, b, y, 7, 2); break;
    default:
        for (int ox = 0; ox < s->wo; ox++) depthwise_pixel(s, rows, w, b, y + (ptrdiff_t)ox * s->ldy, ox);
    }
}

/* dx[iy][ix][c] = add + sum over taps of g[oy][ox][c] w[tap][c]. g has ldy floats a pixel, dx ldx, add ldr. */
KERNEL depthwise_dx(const struct et_step *s, const float *g, const float *w, const float *add, float *dx) {
    const int C = s->ci;
    for (int iy = 0; iy < s->hi; iy++) {
        const float *grow[ET_MAX_ROWS];
        for (int ky = 0; ky < s->kh; ky++) {
            const int t = iy + s->ph - ky * s->dh;
            grow[ky] = t >= 0 && t % s->sh == 0 && t / s->sh < s->ho ? g + (ptrdiff_t)(t / s->sh) * s->wo * s->ldy : 0;
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
