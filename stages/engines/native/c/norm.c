/* Products, softmax, normalisation by a sample's own statistics, and resizing. */
#include "vector.h"

/* y = x * r + add, or x / r + add where n is 1, pixels of ci values; ldr 0: r is one pixel, the same for all. add has ldy floats a pixel. */
KERNEL multiply(const struct et_step *s, const float *x, const float *r, const float *add, float *y) {
    const int pixels = s->hi * s->wi;
    for (int p = 0; p < pixels; p++, x += s->ldx, r += s->ldr, y += s->ldy, add = add ? add + s->ldy : 0)
        for (int c = 0; c < s->ci; c += VL) {
            const int n = MIN(VL, s->ci - c);
            const vf a = get(x + c, n), b = get(r + c, n), product = s->n ? a / b : a * b;
            put(y + c, n, add ? product + get(add + c, n) : product);
        }
}

/* y[c] = add[c] + sum over pixels of x * r. */
KERNEL dot(const struct et_step *s, const float *x, const float *r, const float *add, float *y) {
    const int pixels = s->hi * s->wi;
    for (int c = 0; c < s->ci; c += VL) {
        const int n = MIN(VL, s->ci - c);
        vf sum = vset(0);
        for (ptrdiff_t p = 0; p < pixels; p++) sum += get(x + p * s->ldx + c, n) * get(r + p * s->ldr + c, n);
        put(y + c, n, add ? sum + get(add + c, n) : sum);
    }
}

/* Over the channels of every pixel; n = 1: its logarithm. */
KERNEL softmax(const struct et_step *s, const float *x, float *y) {
    const int pixels = s->hi * s->wi;
    for (int p = 0; p < pixels; p++, x += s->ldx, y += s->ldy) {
        float top = x[0], sum = 0;
        for (int c = 1; c < s->ci; c++) top = MAX(top, x[c]);
        if (s->n) {
            for (int c = 0; c < s->ci; c++) sum += et_expf(x[c] - top);
            const float log_sum = et_log(sum);
            for (int c = 0; c < s->ci; c++) y[c] = x[c] - top - log_sum;
        } else {
            for (int c = 0; c < s->ci; c += VL) {
                const int n = MIN(VL, s->ci - c);
                put(y + c, n, vexp(get(x + c, n) - top));
            }
            for (int c = 0; c < s->ci; c++) sum += y[c];
            for (int c = 0; c < s->ci; c++) y[c] /= sum;
        }
    }
}

/* From its output y (ldx), the gradient g (ldy): y (g - sum y g), or of the logarithm g - exp(y) sum g. */
KERNEL softmax_dx(const struct et_step *s, const float *y, const float *g, const float *add, float *dx) {
    const int pixels = s->hi * s->wi;
    for (int p = 0; p < pixels; p++, y += s->ldx, g += s->ldy, dx += s->ldy, add = add ? add + s->ldr : 0) {
        float sum = 0;
        for (int c = 0; c < s->ci; c++) sum += s->n ? g[c] : y[c] * g[c];
        for (int c = 0; c < s->ci; c++) {
            const float d = s->n ? g[c] - et_expf(y[c]) * sum : y[c] * (g[c] - sum);
            dx[c] = add ? d + add[c] : d;
        }
    }
}

/* Mean and 1 / deviation of each of n groups of channels, over all pixels: room (2 ci) gets them channel by channel. */
INL void statistics(const struct et_step *s, const float *x, float *room) {
    const int pixels = s->hi * s->wi, width = s->ci / s->n;
    const float count = (float)pixels * (float)width, eps = et_float(s->a0);
    float *means = room, *scales = room + s->ci;
    for (int c = 0; c < s->ci; c++) means[c] = scales[c] = 0;
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) means[c] += x[p * s->ldx + c];
    for (int c = 0; c < s->ci; c += width) {
        float sum = 0;
        for (int i = 0; i < width; i++) sum += means[c + i];
        for (int i = 0; i < width; i++) means[c + i] = sum / count;
    }
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) {
            const float d = x[p * s->ldx + c] - means[c];
            scales[c] += d * d;
        }
    for (int c = 0; c < s->ci; c += width) {
        float sum = 0;
        for (int i = 0; i < width; i++) sum += scales[c + i];
        const float scale = 1.0f / et_sqrtf(sum / count + eps);
        for (int i = 0; i < width; i++) scales[c + i] = scale;
    }
}

/* y = (x - mean) / sqrt(variance + a0), n groups of channels. room: 4 ci floats. */
KERNEL norm(const struct et_step *s, const float *x, float *y, float *room) {
    const int pixels = s->hi * s->wi;
    statistics(s, x, room);
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) y[p * s->ldy + c] = (x[p * s->ldx + c] - room[c]) * room[s->ci + c];
}

/* With h = norm(x): dx = (g - mean(g) - h mean(g h)) / deviation + add. x has ldx floats a pixel, g and dx ldy. */
KERNEL norm_dx(const struct et_step *s, const float *x, const float *g, const float *add, float *dx, float *room) {
    const int pixels = s->hi * s->wi, width = s->ci / s->n;
    const float count = (float)pixels * (float)width;
    float *means = room, *scales = room + s->ci, *first = room + 2 * s->ci, *second = room + 3 * s->ci;
    statistics(s, x, room);
    for (int c = 0; c < s->ci; c++) first[c] = second[c] = 0;
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) {
            const float v = g[p * s->ldy + c];
            first[c] += v, second[c] += v * ((x[p * s->ldx + c] - means[c]) * scales[c]);
        }
    for (int c = 0; c < s->ci; c += width) {
        float a = 0, b = 0;
        for (int i = 0; i < width; i++) a += first[c + i], b += second[c + i];
        for (int i = 0; i < width; i++) first[c + i] = a / count, second[c + i] = b / count;
    }
    for (ptrdiff_t p = 0; p < pixels; p++)
        for (int c = 0; c < s->ci; c++) {
            const float h = (x[p * s->ldx + c] - means[c]) * scales[c];
            const float d = (g[p * s->ldy + c] - first[c] - h * second[c]) * scales[c];
            dx[p * s->ldy + c] = add ? d + add[p * s->ldr + c] : d;
        }
}

/* The input pixel of an output pixel, resized by repetition. */
INL ptrdiff_t source_pixel(const struct et_step *s, int oy, int ox) {
    return (ptrdiff_t)((int64_t)oy * s->hi / s->ho) * s->wi + (ptrdiff_t)((int64_t)ox * s->wi / s->wo);
}
KERNEL nearest(const struct et_step *s, const float *x, float *y) {
    for (int oy = 0; oy < s->ho; oy++)
        for (int ox = 0; ox < s->wo; ox++, y += s->ldy)
            memmove(y, x + source_pixel(s, oy, ox) * s->ldx, sizeof(float) * (size_t)s->ci);
}
KERNEL nearest_dx(const struct et_step *s, const float *g, const float *add, float *dx) {
    start_from(s, add, dx);
    for (int oy = 0; oy < s->ho; oy++)
        for (int ox = 0; ox < s->wo; ox++, g += s->ldy) {
            float *o = dx + source_pixel(s, oy, ox) * s->ldx;
            for (int c = 0; c < s->ci; c++) o[c] += g[c];
        }
}
