/* Dense convolutions: 1x1 (and linear layers), any kernel, stride, dilation and padding; their two gradients.
 *
 * Weights lie in panels of 16 output channels, [panel][tap row][tap column][in][16]; biases are filled up to 16. */
#include "vector.h"

#define CONV_INIT(r, v) vf ACC(r, v) = s->flags & ET_ACCUMULATE ? get(y + q##r * s->ldy + j + l + v * VL, s->co - j - l - v * VL) : b ? vld(b + j + l + v * VL) : vset(0);
#define CONV_INIT_R(r) const int q##r = MIN(p + r, last); FOR_V(CONV_INIT, r)
#define CONV_LOAD(r, v) vf WGT(v) = vld(wl + c * ET_PANEL + v * VL);
#define CONV_MAC(r, v) ACC(r, v) += WGT(v) * s##r;
#define CONV_MAC_R(r) const float s##r = x##r[c]; FOR_V(CONV_MAC, r)
#define CONV_PUT(r, v)                                                                                                 \
    if (p + r <= last && j + l + v * VL < s->co) {                                                                     \
        const int n = s->co - j - l - v * VL;                                                                          \
        vf t = vact(ACC(r, v), s->act);                                                                                \
        if (res) t = vact(t + get(res + (p + r) * s->ldr + j + l + v * VL, n), s->act2);                               \
        put(y + (p + r) * s->ldy + j + l + v * VL, n, t);                                                              \
    }
#define CONV_PUT_R(r) FOR_V(CONV_PUT, r)

#define PIXEL_R(r) const float *x##r = x + (ptrdiff_t)q##r * s->ldx;
#define PIXELS(RS)                                                                                                     \
    {                                                                                                                  \
        RS(CONV_INIT_R) RS(PIXEL_R)                                                                                    \
        for (int c = 0; c < s->ci; c++) { FOR_V(CONV_LOAD, 0) RS(CONV_MAC_R) }                                         \
        RS(CONV_PUT_R)                                                                                                 \
    }

#if VL == ET_PANEL
/* Two panels at a time: a pixel's value is loaded once for both, and twice as many sums grow at once. */
#define PAIR_V(F, r) F(r, 0) F(r, 1)
#define PAIR_INIT_R(r) const int q##r = MIN(p + r, last); PAIR_V(CONV_INIT, r)
#define PAIR_LOAD(r, v) vf WGT(v) = vld(wl + v * panel + c * ET_PANEL);
#define PAIR_MAC_R(r) const float s##r = x##r[c]; PAIR_V(CONV_MAC, r)
#define PAIR_PUT_R(r) PAIR_V(CONV_PUT, r)
#define PAIRS(RS)                                                                                                      \
    {                                                                                                                  \
        const float *wl = w;                                                                                           \
        RS(PAIR_INIT_R) RS(PIXEL_R)                                                                                    \
        for (int c = 0; c < s->ci; c++) { PAIR_V(PAIR_LOAD, 0) RS(PAIR_MAC_R) }                                        \
        RS(PAIR_PUT_R)                                                                                                 \
    }
#endif

#if VL > 1
/* One pixel: four panels side by side, so that four sums grow at once. */
INL int one_pixel(const struct et_step *s, const float *x, const float *w, const float *b, float *y,
                  const float *res) {
    const ptrdiff_t panel = (ptrdiff_t)s->ci * ET_PANEL;
    int j = 0;
    for (; j + 4 * ET_PANEL <= s->co; j += 4 * ET_PANEL, w += 4 * panel)
        for (int l = 0; l < ET_PANEL; l += VL) {
            const float *w0 = w + l, *w1 = w0 + panel, *w2 = w1 + panel, *w3 = w2 + panel;
            vf a[4];
            for (int k = 0; k < 4; k++) {
                const int o = j + k * ET_PANEL + l;
                a[k] = s->flags & ET_ACCUMULATE ? vld(y + o) : b ? vld(b + o) : vset(0);
            }
            vf a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
            for (int c = 0; c < s->ci; c++) {
                const float t = x[c];
                a0 += vld(w0 + c * ET_PANEL) * t, a1 += vld(w1 + c * ET_PANEL) * t;
                a2 += vld(w2 + c * ET_PANEL) * t, a3 += vld(w3 + c * ET_PANEL) * t;
            }
            a[0] = a0, a[1] = a1, a[2] = a2, a[3] = a3;
            for (int k = 0; k < 4; k++) {
                const int o = j + k * ET_PANEL + l;
                vf t = vact(a[k], s->act);
                if (res) t = vact(t + vld(res + o), s->act2);
                vst(y + o, t);
            }
        }
    return j;
}
#endif

/* y[p][o] = act2(act(b[o] + sum_c x[p][c] w[c][o]) + r[p][o]); ET_ACCUMULATE: the sum begins with what y holds. */
KERNEL pointwise(const struct et_step *s, const float *x, const float *w, const float *b, float *y, const float *res,
                 int pixels) {
    const int last = pixels - 1;
    int j = 0;
#if VL > 1
    if (pixels == 1) j = one_pixel(s, x, w, b, y, res);
    w += (ptrdiff_t)j * s->ci;
#endif
#if VL == ET_PANEL
    const ptrdiff_t panel = (ptrdiff_t)s->ci * ET_PANEL;
    for (const int l = 0; j + ET_PANEL < s->co; j += 2 * ET_PANEL, w += 2 * panel) {
        int p = 0;
        for (; p + HR < pixels; p += MR) PAIRS(FOR_R)
        for (; p < pixels; p += HR) PAIRS(FOR_H)
    }
#endif
    for (; j < s->co; j += ET_PANEL, w += (ptrdiff_t)s->ci * ET_PANEL)
        for (int l = 0; l < ET_PANEL && j + l < s->co; l += TW) {
            const float *wl = w + l;
            int p = 0;
            for (; p + HR < pixels; p += MR) PIXELS(FOR_R)
            for (; p < pixels; p += HR) PIXELS(FOR_H)
        }
}

#define TAP_R(r)                                                                                                       \
    const int i##r = q##r * s->sw - s->pw + kx * s->dw;                                                                \
    const float *x##r = i##r >= 0 && i##r < s->wi ? rows[ky] + (ptrdiff_t)i##r * s->ldx : zeros;
#define START_R(r) const float *x##r = rows[ky] + ((ptrdiff_t)q##r * s->sw - s->pw) * s->ldx;
#define TAPS(RS, N, INIT_R, LOADS, MAC_R, PUT_R)                                                                       \
    {                                                                                                                  \
        RS(INIT_R)                                                                                                     \
        const float *wl = w + l;                                                                                       \
        const int left = p * s->sw - s->pw, right = MIN(p + N - 1, last) * s->sw - s->pw + (s->kw - 1) * s->dw;        \
        if (dense && left >= 0 && right < s->wi) {                                                                     \
            for (int ky = 0; ky < s->kh; ky++, wl += run * ET_PANEL)                                                   \
                if (rows[ky]) {                                                                                        \
                    RS(START_R)                                                                                        \
                    for (int c = 0; c < run; c++) { LOADS RS(MAC_R) }                                                  \
                }                                                                                                      \
        } else                                                                                                         \
            for (int ky = 0; ky < s->kh; ky++)                                                                         \
                for (int kx = 0; kx < s->kw; kx++, wl += s->ci * ET_PANEL)                                             \
                    if (rows[ky]) {                                                                                    \
                        RS(TAP_R)                                                                                      \
                        for (int c = 0; c < s->ci; c++) { LOADS RS(MAC_R) }                                            \
                    }                                                                                                  \
        RS(PUT_R)                                                                                                      \
    }
#define ONE_PANEL(RS, N) TAPS(RS, N, CONV_INIT_R, FOR_V(CONV_LOAD, 0), CONV_MAC_R, CONV_PUT_R)
#define TWO_PANELS(RS, N) TAPS(RS, N, PAIR_INIT_R, PAIR_V(PAIR_LOAD, 0), PAIR_MAC_R, PAIR_PUT_R)

/* One output row of any dense convolution. Taps outside of the map's columns read zeros, its rows are left out. */
KERNEL conv_row(const struct et_step *s, et_taps rows, const float *w, const float *b, float *y, const float *res,
                const float *zeros) {
    const int last = s->wo - 1, dense = s->dw == 1 && s->ldx == s->ci, run = s->kw * s->ci;
    const ptrdiff_t panel = (ptrdiff_t)s->kh * run * ET_PANEL;
    int j = 0;
#if VL == ET_PANEL
    for (const int l = 0; j + ET_PANEL < s->co; j += 2 * ET_PANEL, w += 2 * panel) {
        int p = 0;
        for (; p + HR < s->wo; p += MR) TWO_PANELS(FOR_R, MR)
        for (; p < s->wo; p += HR) TWO_PANELS(FOR_H, HR)
    }
#endif
    for (; j < s->co; j += ET_PANEL, w += panel)
        for (int l = 0; l < ET_PANEL && j + l < s->co; l += TW) {
            int p = 0;
            for (; p + HR < s->wo; p += MR) ONE_PANEL(FOR_R, MR)
            for (; p < s->wo; p += HR) ONE_PANEL(FOR_H, HR)
        }
}

/* ------------------------------------------------------------------------------------------- gradient of the input */

#define ONE_R(F) F(0)
#define DX_LOAD(r, v) vf WGT(v) = vld(scratch + (j + o) * ET_CHUNK + l + v * VL);
#define DX_INIT_R(r) FOR_V(DX_INIT0, r)
#define DX_INIT0(r, v) vf ACC(r, v) = vset(0);
#define DX_MAC(r, v) ACC(r, v) += WGT(v) * s##r;
#define DX_MAC_R(r) const float s##r = wp[r * ET_PANEL + o]; FOR_V(DX_MAC, r)
#define DX_PUT(r, v) vst(t + r * ET_CHUNK + l + v * VL, ACC(r, v));
#define DX_PUT_R(r) FOR_V(DX_PUT, r)
#define DX_TILE(RS)                                                                                                    \
    {                                                                                                                  \
        RS(DX_INIT_R)                                                                                                  \
        for (int j = 0; j < s->co; j += ET_PANEL) {                                                                    \
            const int m = MIN(ET_PANEL, s->co - j);                                                                    \
            const float *wp = w + (ptrdiff_t)j * taps * s->ci + ((ptrdiff_t)tap * s->ci + c) * ET_PANEL;               \
            for (int o = 0; o < m; o++) { FOR_V(DX_LOAD, 0) RS(DX_MAC_R) }                                             \
        }                                                                                                              \
        RS(DX_PUT_R)                                                                                                   \
    }

/* scratch[o][16] = g[source pixel][o], 0 where there is none. */
INL void transpose_chunk(const float *g, ptrdiff_t ldg, int co, const int *source, float *scratch) {
    int o = 0;
#if VL > 1
    typedef float v4 __attribute__((vector_size(16)));
    typedef float v4u __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t i4 __attribute__((vector_size(16)));
    const i4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
    for (; o + 4 <= co; o += 4)
        for (int p = 0; p < ET_CHUNK; p += 4) {
            v4 a[4];
            for (int k = 0; k < 4; k++)
                a[k] = source[p + k] < 0 ? (v4){0} : (v4)*(const v4u *)(const void *)(g + source[p + k] * ldg + o);
#if defined(__clang__)
            v4 ab0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5), ab1 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
            v4 cd0 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5), cd1 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
            v4 t0 = __builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), t1 = __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7);
            v4 t2 = __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5), t3 = __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7);
            (void)low, (void)high, (void)first, (void)second;
#else
            v4 ab0 = __builtin_shuffle(a[0], a[1], low), ab1 = __builtin_shuffle(a[0], a[1], high);
            v4 cd0 = __builtin_shuffle(a[2], a[3], low), cd1 = __builtin_shuffle(a[2], a[3], high);
            v4 t0 = __builtin_shuffle(ab0, cd0, first), t1 = __builtin_shuffle(ab0, cd0, second);
            v4 t2 = __builtin_shuffle(ab1, cd1, first), t3 = __builtin_shuffle(ab1, cd1, second);
#endif
            float *out = scratch + (ptrdiff_t)o * ET_CHUNK + p;
            *(v4u *)(void *)out = t0, *(v4u *)(void *)(out + ET_CHUNK) = t1;
            *(v4u *)(void *)(out + 2 * ET_CHUNK) = t2, *(v4u *)(void *)(out + 3 * ET_CHUNK) = t3;
        }
#endif
    for (; o < co; o++)
        for (int p = 0; p < ET_CHUNK; p++) scratch[o * ET_CHUNK + p] = source[p] < 0 ? 0.0f : g[source[p] * ldg + o];
}

/* The output pixel that a tap carries to input pixel (iy, ix), or -1. */
INL int source_of(const struct et_step *s, int iy, int ix, int ky, int kx) {
    const int y = iy + s->ph - ky * s->dh, x = ix + s->pw - kx * s->dw;
    if (y < 0 || x < 0 || y % s->sh || x % s->sw) return -1;
    return y / s->sh < s->ho && x / s->sw < s->wo ? y / s->sh * s->wo + x / s->sw : -1;
}

/* dx[p][c] = add[p][c] + sum over taps and o of g[q][o] w[tap][c][o]: sixteen pixels are the lanes.
 * scratch: 16 * co floats. g has ldy floats a pixel, dx ldx, add ldr. */
KERNEL conv_dx(const struct et_step *s, const float *g, const float *w, const float *add, float *dx, float *scratch) {
    const int pixels = s->hi * s->wi, taps = s->kh * s->kw;
    for (int p0 = 0; p0 < pixels; p0 += ET_CHUNK) {
        const int n = MIN(ET_CHUNK, pixels - p0);
        const float *more = add;
        ptrdiff_t ldm = s->ldr;
        for (int tap = 0; tap < taps; tap++) {
            int source[ET_CHUNK], any = 0;
            for (int p = 0; p < ET_CHUNK; p++) {
                source[p] = p >= n ? -1 : taps == 1 && s->n ? p0 + p
                          : source_of(s, (p0 + p) / s->wi, (p0 + p) % s->wi, tap / s->kw, tap % s->kw);
                any |= source[p] >= 0;
            }
            if (!any && !(tap + 1 == taps && more == add)) continue; /* the last tap sets dx where no other did */
            transpose_chunk(g, s->ldy, s->co, source, scratch);
            for (int c = 0; c < s->ci;) {
                float t[ET_CHUNK * MR];
                const int rows = c + MR <= s->ci ? MR : c + HR <= s->ci ? HR : 1;
                for (int l = 0; l < ET_CHUNK && l < n; l += TW) {
                    if (rows == MR) DX_TILE(FOR_R)
                    else if (rows == HR) DX_TILE(FOR_H)
                    else DX_TILE(ONE_R)
                }
                for (int p = 0; p < n; p++) {
                    float *to = dx + (p0 + p) * (ptrdiff_t)s->ldx + c;
                    const float *from = more ? more + (p0 + p) * ldm + c : 0;
                    for (int r = 0; r < rows; r++) to[r] = t[r * ET_CHUNK + p] + (from ? from[r] : 0.0f);
                }
                c += rows;
            }
            more = dx, ldm = s->ldx;
        }
    }
}

/* ------------------------------------------------------------------------------------------ gradient of the weight */

#define DW_INIT(r, v) vf ACC(r, v) = vld(gw + (c + r) * ET_PANEL + l + v * VL);
#define DW_INIT_R(r) FOR_V(DW_INIT, r)
#define DW_LOAD(r, v) vf WGT(v) = get(gp + l + v * VL, s->co - j - l - v * VL);
#define DW_LOAD_ALL(r, v) vf WGT(v) = vld(gp + l + v * VL);
#define DW_MAC_R(r) const float s##r = xp[c + r]; FOR_V(DX_MAC, r)
#define DW_PUT(r, v) vst(gw + (c + r) * ET_PANEL + l + v * VL, ACC(r, v));
#define DW_PUT_R(r) FOR_V(DW_PUT, r)
#define DW_TILE(RS, LOAD)                                                                                              \
    {                                                                                                                  \
        RS(DW_INIT_R)                                                                                                  \
        for (int oy = y0; oy < y1; oy++) {                                                                             \
            const float *gp = g + ((ptrdiff_t)oy * s->wo + x0) * s->ldy + j;                                           \
            const float *xp = x + ((ptrdiff_t)(oy * s->sh - s->ph + ky * s->dh) * s->wi + x0 * s->sw - s->pw + kx * s->dw) * s->ldx; \
            for (int ox = x0; ox < x1; ox++, gp += s->ldy, xp += (ptrdiff_t)s->sw * s->ldx) { FOR_V(LOAD, 0) RS(DW_MAC_R) } \
        }                                                                                                              \
        RS(DW_PUT_R)                                                                                                   \
    }
#define DW_TILES(LOAD)                                                                                                 \
    {                                                                                                                  \
        int c = 0;                                                                                                     \
        for (; c + MR <= s->ci; c += MR) DW_TILE(FOR_R, LOAD)                                                          \
        for (; c + HR <= s->ci; c += HR) DW_TILE(FOR_H, LOAD)                                                          \
        for (; c < s->ci; c++) DW_TILE(ONE_R, LOAD)                                                                    \
    }

/* The outputs from first to end whose tap falls into the map. */
INL void tap_range(int offset, int step, int in, int out, int *first, int *end) {
    *first = offset >= 0 ? 0 : (-offset + step - 1) / step;
    *end = in - 1 - offset < 0 ? 0 : MIN(out, (in - 1 - offset) / step + 1);
}

/* gw[panel][tap][c][16] += sum over positions of x[tap's pixel][c] g[pixel][o]. */
KERNEL conv_dw(const struct et_step *s, const float *x, const float *g, float *gw) {
    for (int j = 0; j < s->co; j += ET_PANEL)
        for (int ky = 0; ky < s->kh; ky++)
            for (int kx = 0; kx < s->kw; kx++, gw += (ptrdiff_t)s->ci * ET_PANEL) {
                int y0, y1, x0, x1;
                tap_range(ky * s->dh - s->ph, s->sh, s->hi, s->ho, &y0, &y1);
                tap_range(kx * s->dw - s->pw, s->sw, s->wi, s->wo, &x0, &x1);
                for (int l = 0; l < ET_PANEL && j + l < s->co; l += TW)
                    if (j + l + TW <= s->co) DW_TILES(DW_LOAD_ALL)
                    else DW_TILES(DW_LOAD)
            }
}

/* gb[i] += sum over pixels of g[p][index[i]]; n channels. */
KERNEL bias_dw(const struct et_step *s, const float *g, const int32_t *index, float *gb) {
    const int pixels = s->ho * s->wo;
    for (int i = 0; i < s->n; i++) {
        float sum = gb[i];
        for (int p = 0; p < pixels; p++) sum += g[(ptrdiff_t)p * s->ldy + index[i]];
        gb[i] = sum;
    }
}
