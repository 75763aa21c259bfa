/* Operators on single values: activations with their gradients, additions, and the bits that ReLU and ReLU6 keep. */
#include "vector.h"

/* y = act(x + r), or act(x - r) where n is 1; pixels of ci values; ldr 0: r is one pixel, the same for all. */
KERNEL add_row(const struct et_step *s, const float *x, const float *r, float *y, int pixels) {
    for (int p = 0; p < pixels; p++, x += s->ldx, r += s->ldr, y += s->ldy)
        for (int c = 0; c < s->ci; c += VL) {
            const int n = MIN(VL, s->ci - c);
            const vf a = get(x + c, n), b = get(r + c, n);
            put(y + c, n, vact(s->n ? a - b : a + b, s->act));
        }
}

INL float activate(int act, float v, float a, float b) {
    switch (act) {
    case ET_RELU: return v < 0 ? 0 : v;
    case ET_RELU6: return v < 0 ? 0 : v > 6 ? 6 : v;
    case ET_LEAKY_RELU: return v < 0 ? v * a : v;
    case ET_ELU: return b * (v < 0 ? a * et_expm1f(v) : v);
    case ET_HARDSWISH: return v * (v <= -3 ? 0.0f : v >= 3 ? 1.0f : v / 6.0f + 0.5f);
    case ET_HARDSIGMOID: return v <= -3 ? 0.0f : v >= 3 ? 1.0f : v / 6.0f + 0.5f;
    case ET_SILU: return v * et_sigmoidf(v);
    case ET_GELU: return 0.5f * v * (1.0f + et_erff(v * 0.70710678f));
    case ET_GELU_TANH: return 0.5f * v * (1.0f + et_tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case ET_SIGMOID: return et_sigmoidf(v);
    case ET_TANH: return et_tanhf(v);
    case ET_CLAMP: return v < a ? a : v > b ? b : v;
    case ET_EXP: return et_expf(v);
    case ET_SOFTPLUS: return et_softplusf(v * a) / a;
    case ET_MISH: return v * et_tanhf(et_softplusf(v));
    case ET_ABS: return v < 0 ? -v : v;
    default: return v;
    }
}

/* The slope at x. */
INL float slope(int act, float v, float a, float b) {
    switch (act) {
    case ET_RELU: return v > 0 ? 1.0f : 0.0f;
    case ET_RELU6: return v > 0 && v < 6 ? 1.0f : 0.0f;
    case ET_LEAKY_RELU: return v > 0 ? 1.0f : a;
    case ET_ELU: return b * (v > 0 ? 1.0f : a * et_expf(v));
    case ET_HARDSWISH: return v < -3 ? 0.0f : v <= 3 ? v / 3.0f + 0.5f : 1.0f;
    case ET_HARDSIGMOID: return v > -3 && v < 3 ? 1.0f / 6.0f : 0.0f;
    case ET_SILU: { const float t = et_sigmoidf(v); return t * (1.0f + v * (1.0f - t)); }
    case ET_GELU: return 0.5f * (1.0f + et_erff(v * 0.70710678f)) + v * 0.39894228f * et_expf(-0.5f * v * v);
    case ET_GELU_TANH: {
        const float t = et_tanhf(0.79788456f * (v + 0.044715f * v * v * v));
        return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * v * v);
    }
    case ET_SIGMOID: { const float t = et_sigmoidf(v); return t * (1.0f - t); }
    case ET_TANH: { const float t = et_tanhf(v); return 1.0f - t * t; }
    case ET_CLAMP: return v >= a && v <= b ? 1.0f : 0.0f;
    case ET_EXP: return et_expf(v);
    case ET_SOFTPLUS: return et_sigmoidf(v * a);
    case ET_MISH: {
        const float t = et_tanhf(et_softplusf(v));
        return t + v * (1.0f - t * t) * et_sigmoidf(v);
    }
    case ET_ABS: return v > 0 ? 1.0f : v < 0 ? -1.0f : 0.0f;
    default: return 1.0f;
    }
}

/* One loop per activation, so that each can become a loop of vectors. */
#define EACH_ACTIVATION(DO)                                                                                            \
    switch (s->act) {                                                                                                  \
    case ET_RELU: DO(ET_RELU) break;                                                                                   \
    case ET_RELU6: DO(ET_RELU6) break;                                                                                 \
    case ET_LEAKY_RELU: DO(ET_LEAKY_RELU) break;                                                                       \
    case ET_ELU: DO(ET_ELU) break;                                                                                     \
    case ET_HARDSWISH: DO(ET_HARDSWISH) break;                                                                         \
    case ET_HARDSIGMOID: DO(ET_HARDSIGMOID) break;                                                                     \
    case ET_SILU: DO(ET_SILU) break;                                                                                   \
    case ET_GELU: DO(ET_GELU) break;                                                                                   \
    case ET_GELU_TANH: DO(ET_GELU_TANH) break;                                                                         \
    case ET_SIGMOID: DO(ET_SIGMOID) break;                                                                             \
    case ET_TANH: DO(ET_TANH) break;                                                                                   \
    case ET_CLAMP: DO(ET_CLAMP) break;                                                                                 \
    case ET_EXP: DO(ET_EXP) break;                                                                                     \
    case ET_SOFTPLUS: DO(ET_SOFTPLUS) break;                                                                           \
    case ET_MISH: DO(ET_MISH) break;                                                                                   \
    case ET_ABS: DO(ET_ABS) break;                                                                                     \
    default: DO(ET_LINEAR) break;                                                                                      \
    }

/* y = act(x), pixels of ci values; may be in place. */
KERNEL unary(const struct et_step *s, const float *x, float *y, int pixels) {
    const float a = et_float(s->a0), b = et_float(s->a1);
    const int straight = s->ldx == s->ci && s->ldy == s->ci; /* as one long pixel: few channels fill no vector */
    const ptrdiff_t count = straight ? (ptrdiff_t)pixels * s->ci : s->ci;
    for (int p = 0; p < (straight ? 1 : pixels); p++, x += s->ldx, y += s->ldy)
#define UNARY(ACT) for (ptrdiff_t c = 0; c < count; c++) y[c] = activate(ACT, x[c], a, b);
        EACH_ACTIVATION(UNARY)
}

/* dx = g * slope(x) + add; x has ldx floats a pixel, g ldy, add ldr; dx as g. */
KERNEL unary_dx(const struct et_step *s, const float *x, const float *g, const float *add, float *dx) {
    const float a = et_float(s->a0), b = et_float(s->a1);
    const int straight = s->ldx == s->ci && s->ldy == s->ci && (!add || s->ldr == s->ci);
    const int pixels = straight ? 1 : s->hi * s->wi;
    const ptrdiff_t count = straight ? (ptrdiff_t)s->hi * s->wi * s->ci : s->ci;
    for (int p = 0; p < pixels; p++, x += s->ldx, g += s->ldy, dx += s->ldy, add = add ? add + s->ldr : 0)
#define UNARY_DX(ACT) for (ptrdiff_t c = 0; c < count; c++) dx[c] = g[c] * slope(ACT, x[c], a, b) + (add ? add[c] : 0.0f);
        EACH_ACTIVATION(UNARY_DX)
}

/* One bit per value where a gradient passes ReLU (above 0) or ReLU6 (between 0 and 6, ends excluded): words of sixteen
 * neighbours, bit k for the k-th sixteen; 512 values are 16 words. */
KERNEL mask(const float *y, size_t n, int act, uint32_t *words) {
    const float top = act == ET_RELU6 ? 6.0f : 3.4028235e38f;
    for (size_t at = 0; at < n; at += 512, y += 512, words += 16) {
        const int left = (int)MIN((size_t)512, n - at);
        for (int l = 0; l < 16; l += VL) {
#if VL > 1
            vi bits = {0};
            for (int k = 0; k * 16 + l < left; k++) {
                const vf v = get(y + k * 16 + l, left - k * 16 - l);
                bits |= (vi)(v > 0) & (vi)(v < top) & ((vi){0} + (int32_t)(1u << k));
            }
            memcpy(words + l, &bits, sizeof bits);
#else
            uint32_t bits = 0;
            for (int k = 0; k * 16 + l < left; k++)
                bits |= (uint32_t)((y[k * 16 + l] > 0) & (y[k * 16 + l] < top)) << k;
            words[l] = bits;
#endif
        }
    }
}

/* y = g where the bit is set, else 0. */
KERNEL mask_back(const float *g, size_t n, const uint32_t *words, float *y) {
    for (size_t at = 0; at < n; at += 512, g += 512, y += 512, words += 16) {
        const int left = (int)MIN((size_t)512, n - at);
        for (int l = 0; l < 16; l += VL) {
#if VL > 1
            vi bits;
            memcpy(&bits, words + l, sizeof bits);
            for (int k = 0; k * 16 + l < left; k++) {
                const int m = left - k * 16 - l;
                const vi pass = (vi)((bits & ((vi){0} + (int32_t)(1u << k))) != 0);
                put(y + k * 16 + l, m, (vf)((vi)get(g + k * 16 + l, m) & pass));
            }
#else
            for (int k = 0; k * 16 + l < left; k++) y[k * 16 + l] = (words[l] >> k) & 1u ? g[k * 16 + l] : 0.0f;
#endif
        }
    }
}
