/* Heads on features: a linear classifier, prototypes, their losses with gradients, and closed-form importance. */
#include "internal.h"

float et_exp(float x) { return et_expf(x); }

float et_log(float x) { /* log(2^e m) = e log 2 + 2 artanh((m - 1) / (m + 1)), m between sqrt(1/2) and sqrt(2) */
    int32_t bits, e = 0;
    if (x != x || x < 0) return et_float(0x7fc00000);
    if (x == 0) return et_float((int32_t)0xff800000u);
    if (x > 3.4028235e38f) return x;
    if (x < 1.17549435e-38f) x *= 16777216.0f, e = -24;
    memcpy(&bits, &x, sizeof bits);
    e += ((bits - 0x3f3504f3) >> 23);
    const float m = et_float(bits - (((bits - 0x3f3504f3) >> 23) * (1 << 23)));
    const float s = (m - 1.0f) / (m + 1.0f), q = s * s;
    const float series = q * (0.666666667f + q * (0.4f + q * (0.285714286f + q * (0.222222222f + q * 0.181818182f))));
    return (float)e * 0.693145752f + ((float)e * 1.42860677e-6f + s * (2.0f + series));
}

void et_linear(const float *features, const float *weight, const float *bias, float *logits, size_t n, size_t d,
               size_t c) {
    for (size_t i = 0; i < n; i++)
        for (size_t k = 0; k < c; k++) {
            float sum = bias ? bias[k] : 0;
            for (size_t j = 0; j < d; j++) sum += features[i * d + j] * weight[k * d + j];
            logits[i * c + k] = sum;
        }
}

/* logits (c) -> probabilities, in place or not; the log of their sum's scale and the largest logit. */
static float softmax(const float *logits, float *p, size_t c, float *top) {
    float sum = 0;
    *top = logits[0];
    for (size_t k = 1; k < c; k++) *top = MAX(*top, logits[k]);
    for (size_t k = 0; k < c; k++) sum += p[k] = et_expf(logits[k] - *top);
    for (size_t k = 0; k < c; k++) p[k] /= sum;
    return sum;
}

float et_softmax_loss(const float *logits, const int32_t *labels, const float *weights, float *gradient, size_t n,
                      size_t c) {
    float loss = 0;
    for (size_t i = 0; i < n; i++, logits += c, gradient += c) {
        const float w = weights ? weights[i] : 1.0f / (float)n, own = logits[labels[i]];
        float top;
        const float sum = softmax(logits, gradient, c, &top);
        loss += w * (et_log(sum) - (own - top));
        gradient[labels[i]] -= 1.0f;
        for (size_t k = 0; k < c; k++) gradient[k] *= w;
    }
    return loss;
}

void et_linear_gradients(const float *features, const float *weight, const float *gradient, float *weight_gradient,
                         float *bias_gradient, float *feature_gradient, size_t n, size_t d, size_t c) {
    for (size_t i = 0; i < n; i++, features += d, gradient += c) {
        if (feature_gradient) memset(feature_gradient, 0, d * sizeof(float));
        for (size_t k = 0; k < c; k++) {
            if (bias_gradient) bias_gradient[k] += gradient[k];
            if (weight_gradient)
                for (size_t j = 0; j < d; j++) weight_gradient[k * d + j] += gradient[k] * features[j];
            if (feature_gradient)
                for (size_t j = 0; j < d; j++) feature_gradient[j] += gradient[k] * weight[k * d + j];
        }
        if (feature_gradient) feature_gradient += d;
    }
}

static float dot(const float *a, const float *b, size_t d) {
    float sum = 0;
    for (size_t j = 0; j < d; j++) sum += a[j] * b[j];
    return sum;
}
static float length(const float *a, size_t d) { return MAX(et_sqrtf(dot(a, a, d)), 1e-12f); }

/* Gradient of a / |a| pulled back: g -> (g - (g . u) u) / norm, u = a / norm. */
static void through_norm(float *g, const float *u, float norm, size_t d) {
    const float along = dot(g, u, d);
    for (size_t j = 0; j < d; j++) g[j] = (g[j] - along * u[j]) / norm;
}

int et_prototype_loss(const float *features, const int32_t *labels, float *gradient, float *work, size_t n, size_t d,
                      size_t ways, float scale, float *loss) {
    float *unit = work, *pull = unit + ways * d, *norm = pull + ways * d, *count = norm + ways;
    memset(work, 0, ways * (2 * d + 2) * sizeof *work);
    *loss = 0;
    for (size_t i = 0; i < n; i++) {
        if (labels[i] < 0 || (size_t)labels[i] >= ways) return ET_BAD_ARGUMENT;
        count[labels[i]] += 1;
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < d; j++) unit[(size_t)labels[i] * d + j] += features[i * d + j] / count[labels[i]];
    for (size_t k = 0; k < ways; k++) {
        norm[k] = length(unit + k * d, d);
        for (size_t j = 0; j < d; j++) unit[k * d + j] /= norm[k];
    }
    for (size_t i = 0; i < n; i++) { /* the query's gradient rows serve as its unit vector first */
        const float *query = features + (n + i) * d;
        float *g = gradient + (n + i) * d, *u = gradient + i * d; /* the support's rows are free until the end */
        const float own_norm = length(query, d);
        float top = 0, sum = 0, own = 0;
        for (size_t j = 0; j < d; j++) u[j] = query[j] / own_norm;
        for (size_t k = 0; k < ways; k++) {
            const float z = scale * dot(u, unit + k * d, d);
            top = k ? MAX(top, z) : z;
            if ((size_t)labels[i] == k) own = z;
        }
        for (size_t k = 0; k < ways; k++) sum += et_expf(scale * dot(u, unit + k * d, d) - top);
        *loss += (et_log(sum) - (own - top)) / (float)n;
        memset(g, 0, d * sizeof *g);
        for (size_t k = 0; k < ways; k++) {
            const float p = et_expf(scale * dot(u, unit + k * d, d) - top) / sum;
            const float gz = scale * (p - ((size_t)labels[i] == k ? 1.0f : 0.0f)) / (float)n;
            for (size_t j = 0; j < d; j++) g[j] += gz * unit[k * d + j], pull[k * d + j] += gz * u[j];
        }
        through_norm(g, u, own_norm, d);
    }
    for (size_t k = 0; k < ways; k++)
        if (count[k] > 0) through_norm(pull + k * d, unit + k * d, norm[k] * count[k], d);
    for (size_t i = 0; i < n; i++) memcpy(gradient + i * d, pull + (size_t)labels[i] * d, d * sizeof *gradient);
    return ET_OK;
}

void et_last_layer_importance(const float *features, const float *logits, const int32_t *labels, float *importance,
                              size_t n, size_t d, size_t c) {
    for (size_t i = 0; i < n; i++, features += d, logits += c) {
        float top = logits[0], sum = 0, square = 0;
        for (size_t k = 1; k < c; k++) top = MAX(top, logits[k]);
        for (size_t k = 0; k < c; k++) sum += et_expf(logits[k] - top);
        for (size_t k = 0; k < c; k++) {
            const float g = et_expf(logits[k] - top) / sum - ((size_t)labels[i] == k ? 1.0f : 0.0f);
            square += g * g;
        }
        importance[i] = et_sqrtf(square * (dot(features, features, d) + 1.0f));
    }
}

void et_squared_sums(const float *values, const float *gradient, float *sums, size_t p, size_t c) {
    for (size_t k = 0; k < c; k++) {
        float sum = 0;
        for (size_t i = 0; i < p; i++) sum += values[i * c + k] * gradient[i * c + k];
        sums[k] += sum * sum;
    }
}
