/* Pooling of windows and of whole maps, and its gradients. */
#include "vector.h"

/* Where the window of output o begins along one axis. */
INL int first_of(const struct et_step *s, int o, int step, int pad, int in, int out) {
    return s->flags & ET_ADAPTIVE ? (int)((int64_t)o * in / out) : o * step - pad;
}

/* One output row of maxima; index (may be 0) gets the position of each inside its window, the first where several are
 * equal. */
KERNEL max_pool_row(const struct et_step *s, et_taps rows, float *y, uint8_t *index) {
    for (int ox = 0; ox < s->wo; ox++, y += s->ldy) {
        const int left = first_of(s, ox, s->sw, s->pw, s->wi, s->wo);
        const int end = s->flags & ET_ADAPTIVE ? (int)(((int64_t)(ox + 1) * s->wi + s->wo - 1) / s->wo) : s->wi;
        for (int c = 0; c < s->ci; c += VL) {
            const int n = MIN(VL, s->ci - c);
            vf most = vset(0);
            vi place = VI(0);
            int seen = 0;
            for (int ky = 0; ky < s->kh; ky++)
                if (rows[ky])
                    for (int kx = 0; kx < s->kw; kx++) {
                        const int ix = left + kx * s->dw;
                        if (ix < 0 || ix >= end) continue;
                        const vf v = get(rows[ky] + (ptrdiff_t)ix * s->ldx + c, n);
                        /* what is no number is the largest, and stays so */
                        const vi more = seen ? ~(vi)VCMP(v <= most) & (vi)VCMP(most == most) : ~VI(0);
                        most = choose(more, v, most);
                        if (index) place = (VI(ky * s->kw + kx) & more) | (place & ~more);
                        seen = 1;
                    }
            put(y + c, n, most);
            if (index) {
                int32_t at[VL];
                memcpy(at, &place, sizeof at);
                for (int i = 0; i < n; i++) index[c + i] = (uint8_t)at[i];
            }
        }
        if (index) index += s->ci;
    }
}

INL void start_from(const struct et_step *s, const float *add, float *dx) {
    if (add == dx) return;
    for (ptrdiff_t p = 0; p < (ptrdiff_t)s->hi * s->wi; p++)
        if (add) memmove(dx + p * s->ldx, add + p * s->ldr, sizeof(float) * (size_t)s->ci);
        else memset(dx + p * s->ldx, 0, sizeof(float) * (size_t)s->ci);
}

KERNEL max_pool_dx(const struct et_step *s, const float *g, const uint8_t *index, const float *add, float *dx) {
    start_from(s, add, dx);
    for (int oy = 0; oy < s->ho; oy++)
        for (int ox = 0; ox < s->wo; ox++, g += s->ldy)
            for (int c = 0; c < s->ci; c++) {
                const int at = *index++;
                const int iy = first_of(s, oy, s->sh, s->ph, s->hi, s->ho) + at / s->kw * s->dh;
                const int ix = first_of(s, ox, s->sw, s->pw, s->wi, s->wo) + at % s->kw * s->dw;
                if (iy >= 0 && iy < s->hi && ix >= 0 && ix < s->wi) /* also where the index is not this step's */
                    dx[((ptrdiff_t)iy * s->wi + ix) * s->ldx + c] += g[c];
            }
}

/* The window of output o along one axis, cut to the map, and by how much it counts. */
INL void window(const struct et_step *s, int o, int k, int step, int pad, int in, int out, int *from, int *to, int *count) {
    int start = o * step - pad, end = start + k;
    if (s->flags & ET_ADAPTIVE) start = (int)((int64_t)o * in / out), end = (int)(((int64_t)(o + 1) * in + out - 1) / out);
    else end = MIN(end, in + pad);
    *count = end - start;
    *from = MAX(start, 0), *to = MIN(end, in);
    if (!(s->flags & ET_COUNT_PAD)) *count = *to - *from;
}

/* One output row of means; rows[k] is the window's k-th row. */
KERNEL avg_pool_row(const struct et_step *s, et_taps rows, float *y, int oy) {
    int y0, y1, rows_counted, x0, x1, columns;
    window(s, oy, s->kh, s->sh, s->ph, s->hi, s->ho, &y0, &y1, &rows_counted);
    for (int ox = 0; ox < s->wo; ox++, y += s->ldy) {
        window(s, ox, s->kw, s->sw, s->pw, s->wi, s->wo, &x0, &x1, &columns);
        for (int c = 0; c < s->ci; c++) y[c] = 0;
        for (int ky = 0; ky < s->kh; ky++)
            if (rows[ky])
                for (int ix = x0; ix < x1; ix++) {
                    const float *xp = rows[ky] + (ptrdiff_t)ix * s->ldx;
                    for (int c = 0; c < s->ci; c++) y[c] += xp[c];
                }
        const float count = (float)rows_counted * (float)columns;
        for (int c = 0; c < s->ci; c++) y[c] /= count;
    }
}

KERNEL avg_pool_dx(const struct et_step *s, const float *g, const float *add, float *dx) {
    start_from(s, add, dx);
    for (int oy = 0; oy < s->ho; oy++)
        for (int ox = 0; ox < s->wo; ox++, g += s->ldy) {
            int y0, y1, rows, x0, x1, columns;
            window(s, oy, s->kh, s->sh, s->ph, s->hi, s->ho, &y0, &y1, &rows);
            window(s, ox, s->kw, s->sw, s->pw, s->wi, s->wo, &x0, &x1, &columns);
            const float count = (float)rows * (float)columns;
            for (int iy = y0; iy < y1; iy++)
                for (int ix = x0; ix < x1; ix++) {
                    float *o = dx + ((ptrdiff_t)iy * s->wi + ix) * s->ldx;
                    for (int c = 0; c < s->ci; c++) o[c] += g[c] / count;
                }
        }
}

/* Mean over all positions: (hi * wi, ci) -> (ci). */
KERNEL mean(const struct et_step *s, const float *x, float *y) {
    const int pixels = s->hi * s->wi;
    for (int c = 0; c < s->ci; c++) y[c] = 0;
    for (int p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) y[c] += x[(ptrdiff_t)p * s->ldx + c];
    for (int c = 0; c < s->ci; c++) y[c] /= (float)pixels;
}
KERNEL mean_dx(const struct et_step *s, const float *g, const float *add, float *dx) {
    const int pixels = s->hi * s->wi;
    for (int p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++)
            dx[(ptrdiff_t)p * s->ldx + c] = g[c] / (float)pixels + (add ? add[(ptrdiff_t)p * s->ldr + c] : 0.0f);
}

/* The largest over all positions: (hi * wi, ci) -> (ci). */
KERNEL amax(const struct et_step *s, const float *x, float *y) {
    const ptrdiff_t pixels = (ptrdiff_t)s->hi * s->wi;
    memmove(y, x, sizeof(float) * (size_t)s->ci);
    for (ptrdiff_t p = 1; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) {
            const float v = x[p * s->ldx + c];
            y[c] = !(v <= y[c]) && y[c] == y[c] ? v : y[c];
        }
}
/* All that equal the largest share its gradient evenly. */
KERNEL amax_dx(const struct et_step *s, const float *x, const float *y, const float *g, const float *add, float *dx) {
    const ptrdiff_t pixels = (ptrdiff_t)s->hi * s->wi;
    for (int c = 0; c < s->ci; c++) {
        int count = 0;
        for (ptrdiff_t p = 0; p < pixels; p++) count += x[p * s->ldx + c] == y[c];
        for (ptrdiff_t p = 0; p < pixels; p++) {
            const float d = x[p * s->ldx + c] == y[c] ? g[c] / (float)count : 0.0f;
            dx[p * s->ldy + c] = add ? d + add[p * s->ldr + c] : d;
        }
    }
}
