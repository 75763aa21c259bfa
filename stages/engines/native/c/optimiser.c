/* SGD and Adam over values that lie side by side. */
#include "internal.h"

void et_sgd(float *values, const float *gradient, float *momentum, size_t n, float rate, float share,
            float weight_decay, int first) {
    for (size_t i = 0; i < n; i++) {
        float g = gradient[i] + weight_decay * values[i];
        if (momentum) momentum[i] = g = first ? g : share * momentum[i] + g;
        values[i] -= rate * g;
    }
}

static double power(double base, uint32_t exponent) {
    double result = 1;
    for (; exponent; exponent >>= 1, base *= base)
        if (exponent & 1) result *= base;
    return result;
}

void et_adam(float *values, const float *gradient, float *mean, float *square, size_t n, float rate, float weight_decay,
             int decoupled, uint32_t update) {
    const float spread = et_sqrtf((float)(1 - power(0.999, update))), step = (float)((double)rate / (1 - power(0.9, update)));
    const float keep = decoupled ? (float)(1 - (double)rate * (double)weight_decay) : 1.0f, pull = decoupled ? 0.0f : weight_decay;
    for (size_t i = 0; i < n; i++) {
        const float v = values[i] * keep, g = gradient[i] + pull * v;
        mean[i] += (float)(1 - 0.9) * (g - mean[i]);
        square[i] = 0.999f * square[i] + (float)(1 - 0.999) * g * g;
        values[i] = v - step * mean[i] / (et_sqrtf(square[i]) / spread + 1e-8f);
    }
}
