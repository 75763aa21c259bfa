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

#define IF(condition, yes, no) choose(VCMP(condition), (yes), (no))

/* et_expf lane by lane, operation by operation: the same bits. */
INL vf vexp(vf x) {
    const vf c = IF(x > 88.0f, vset(88.0f), x), v = IF(c > -87.3f, c, vset(-87.3f));
    const vf s = v * 1.44269504f;
    const vi n = vint(s + IF(s < 0.0f, vset(-0.5f), vset(0.5f)));
    const vf k = vfloat(n), r = (v - k * 0.693145752f) - k * 1.42860677e-6f;
    const vf p = 0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f));
    const vf y = (1.0f + r * (1.0f + r * (0.5f + r * p))) * vbits((n + 127) * (1 << 23));
    return IF(x != x, x, IF(x < -87.3f, vset(0), y));
}
/* exp(x) - 1 of x below 0; near 0 by its series. */
INL vf vexpm1(vf x) {
    const vf series = x * (1.0f + x * (0.5f + x * (0.166666667f + x * (0.0416666667f + x * 0.00833333333f))));
    return IF(x > -0.25f, series, vexp(x) - 1.0f);
}
/* By exp of the negative absolute value; near 0 by its series. */
INL vf vtanh(vf x) {
    const vf a = IF(x < 0.0f, -x, x), e = vexp(-2.0f * a), q = x * x;
    const vf series = x * (1.0f - q * (0.333333333f - q * (0.133333333f - q * 0.0539682540f)));
    const vf t = (1.0f - e) / (1.0f + e);
    return IF(a < 0.25f, series, IF(x < 0.0f, -t, t));
}
/* Abramowitz and Stegun 7.1.26 away from 0 (within 2e-7), its series near it. */
INL vf verf(vf x) {
    const vf a = IF(x < 0.0f, -x, x), q = x * x, t = 1.0f / (1.0f + 0.3275911f * a);
    const vf p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const vf series = x * (1.128379167f - q * (0.376126389f - q * (0.112837917f - q * 0.0268661706f)));
    const vf e = 1.0f - p * vexp(-q);
    return IF(a < 0.3f, series, IF(x < 0.0f, -e, e));
}
/* max(x, 0) + log(1 + exp(-|x|)), the logarithm as twice the inverse hyperbolic tangent of e / (2 + e). */
INL vf vsoftplus(vf x) {
    const vf e = vexp(IF(x < 0.0f, x, -x)), s = e / (2.0f + e), q = s * s;
    const vf log1p = s * (2.0f + q * (0.666666667f + q * (0.4f + q * (0.285714286f + q * (0.222222222f + q * 0.181818182f)))));
    return IF(x > 0.0f, x, vset(0)) + log1p;
}
INL vf vsigmoid(vf x) {
    const vf e = vexp(IF(x < 0.0f, x, -x)), s = 1.0f / (1.0f + e);
    return IF(x != x, x, IF(x < 0.0f, e * s, s));
}

INL vf activate(int act, vf v, float a, float b) {
    const vf zero = vset(0), one = vset(1);
    switch (act) {
    case ET_RELU: return IF(v < 0.0f, zero, v);
    case ET_RELU6: return IF(v < 0.0f, zero, IF(v > 6.0f, vset(6), v));
    case ET_LEAKY_RELU: return IF(v < 0.0f, v * a, v);
    case ET_ELU: return b * IF(v < 0.0f, a * vexpm1(v), v);
    case ET_HARDSWISH: return v * IF(v <= -3.0f, zero, IF(v >= 3.0f, one, v / 6.0f + 0.5f));
    case ET_HARDSIGMOID: return IF(v <= -3.0f, zero, IF(v >= 3.0f, one, v / 6.0f + 0.5f));
    case ET_SILU: return v * vsigmoid(v);
    case ET_GELU: return 0.5f * v * (1.0f + verf(v * 0.70710678f));
    case ET_GELU_TANH: return 0.5f * v * (1.0f + vtanh(0.79788456f * (v + 0.044715f * v * v * v)));
    case ET_SIGMOID: return vsigmoid(v);
    case ET_TANH: return vtanh(v);
    case ET_CLAMP: return IF(v < a, vset(a), IF(v > b, vset(b), v));
    case ET_EXP: return vexp(v);
    case ET_SOFTPLUS: return vsoftplus(v * a) / a;
    case ET_MISH: return v * vtanh(vsoftplus(v));
    case ET_ABS: return IF(v < 0.0f, -v, v);
    default: return v;
    }
}

/* The slope at x. */
INL vf slope(int act, vf v, float a, float b) {
    const vf zero = vset(0), one = vset(1);
    switch (act) {
    case ET_RELU: return IF(v > 0.0f, one, zero);
    case ET_RELU6: return IF(v > 0.0f, IF(v < 6.0f, one, zero), zero);
    case ET_LEAKY_RELU: return IF(v > 0.0f, one, vset(a));
    case ET_ELU: return b * IF(v > 0.0f, one, a * vexp(v));
    case ET_HARDSWISH: return IF(v < -3.0f, zero, IF(v <= 3.0f, v / 3.0f + 0.5f, one));
    case ET_HARDSIGMOID: return IF(v > -3.0f, IF(v < 3.0f, vset(1.0f / 6.0f), zero), zero);
    case ET_SILU: { const vf t = vsigmoid(v); return t * (1.0f + v * (1.0f - t)); }
    case ET_GELU: return 0.5f * (1.0f + verf(v * 0.70710678f)) + v * 0.39894228f * vexp(-0.5f * v * v);
    case ET_GELU_TANH: {
        const vf t = vtanh(0.79788456f * (v + 0.044715f * v * v * v));
        return 0.5f * (1.0f + t) + 0.5f * v * (1.0f - t * t) * 0.79788456f * (1.0f + 0.134145f * v * v);
    }
    case ET_SIGMOID: { const vf t = vsigmoid(v); return t * (1.0f - t); }
    case ET_TANH: { const vf t = vtanh(v); return 1.0f - t * t; }
    case ET_CLAMP: return IF(v >= a, IF(v <= b, one, zero), zero);
    case ET_EXP: return vexp(v);
    case ET_SOFTPLUS: return vsigmoid(v * a);
    case ET_MISH: {
        const vf t = vtanh(vsoftplus(v));
        return t + v * (1.0f - t * t) * vsigmoid(v);
    }
    case ET_ABS: return IF(v > 0.0f, one, IF(v < 0.0f, -one, zero));
    default: return one;
    }
}

/* One loop per activation. */
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
#define UNARY(ACT)                                                                                                     \
    for (ptrdiff_t c = 0; c < count; c += VL) {                                                                        \
        const int n = (int)MIN((ptrdiff_t)VL, count - c);                                                              \
        put(y + c, n, activate(ACT, get(x + c, n), a, b));                                                             \
    }
        EACH_ACTIVATION(UNARY)
}

/* dx = g * slope(x) + add; x has ldx floats a pixel, g ldy, add ldr; dx as g. */
KERNEL unary_dx(const struct et_step *s, const float *x, const float *g, const float *add, float *dx) {
    const float a = et_float(s->a0), b = et_float(s->a1);
    const int straight = s->ldx == s->ci && s->ldy == s->ci && (!add || s->ldr == s->ci);
    const int pixels = straight ? 1 : s->hi * s->wi;
    const ptrdiff_t count = straight ? (ptrdiff_t)s->hi * s->wi * s->ci : s->ci;
    for (int p = 0; p < pixels; p++, x += s->ldx, g += s->ldy, dx += s->ldy, add = add ? add + s->ldr : 0)
#define UNARY_DX(ACT)                                                                                                  \
    for (ptrdiff_t c = 0; c < count; c += VL) {                                                                        \
        const int n = (int)MIN((ptrdiff_t)VL, count - c);                                                              \
        const vf d = get(g + c, n) * slope(ACT, get(x + c, n), a, b);                                                  \
        put(dx + c, n, add ? d + get(add + c, n) : d + 0.0f);                                                          \
    }
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
/* Numbers that look drawn by chance, each a function of its own number: a few multiplications and shifts. */
INL uint32_t drawn(uint32_t x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}

/* n values as whole numbers of 8 or 16 bits (ci), between their least and largest: floor((x - least) / step + u), u from
 * [0, 1) or, where a1 is set, 1/2. The words: least, step, the numbers. What is no number becomes the least. */
KERNEL pack(const struct et_step *s, const float *x, uint32_t seed, float *packed) {
    const int n = s->n;
    const float top = s->ci == 8 ? 255.0f : 65535.0f;
    vf least = vset(x[0]), most = least;
    int i = 0;
    for (; i + VL <= n; i += VL) {
        const vf v = vld(x + i);
        least = IF(v < least, v, least), most = IF(v > most, v, most);
    }
    float lows[VL], highs[VL];
    vst(lows, least), vst(highs, most);
    float low = lows[0], high = highs[0];
    for (int l = 1; l < VL; l++) low = lows[l] < low ? lows[l] : low, high = highs[l] > high ? highs[l] : high;
    for (; i < n; i++) low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high;
    low += 0.0f; /* no width's own sign of nothing */
    const float range = high - low, up = range > 0 ? top / range : 0;
    const uint32_t salt = drawn(seed ^ (uint32_t)s->a0 * 0x9e3779b9u);
    packed[0] = low, packed[1] = range / top;
    uint8_t *narrow = (uint8_t *)(packed + 2);
    uint16_t *wide = (uint16_t *)(void *)(packed + 2);
    enum { LOT = 256 };
    for (int at = 0; at < n; at += LOT) {
        const int count = MIN(LOT, n - at);
        float lot[LOT];
        for (int k = 0; k < count; k++) {
            const float u = s->a1 ? 0.5f : (float)(int32_t)(drawn(salt + (uint32_t)(at + k)) >> 8) * 5.96046448e-8f;
            const float v = (x[at + k] - low) * up + u, w = v > 0 ? v : 0;
            lot[k] = w < top ? w : top;
        }
        if (s->ci == 8)
            for (int k = 0; k < count; k++) narrow[at + k] = (uint8_t)(int32_t)lot[k];
        else
            for (int k = 0; k < count; k++) wide[at + k] = (uint16_t)(int32_t)lot[k];
    }
    for (i = n * (s->ci / 8); i % 4; i++) narrow[i] = 0; /* the last word is whole: the same bits whoever ran before */
}

KERNEL unpack(const struct et_step *s, const float *packed, float *y) {
    const float low = packed[0], step = packed[1];
    const uint8_t *narrow = (const uint8_t *)(packed + 2);
    const uint16_t *wide = (const uint16_t *)(const void *)(packed + 2);
    if (s->ci == 8)
        for (int i = 0; i < s->n; i++) y[i] = low + (float)narrow[i] * step;
    else
        for (int i = 0; i < s->n; i++) y[i] = low + (float)wide[i] * step;
}

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
