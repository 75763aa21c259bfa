/* SGD and Adam over values that lie side by side. Every product and sum is one operation in single precision, in the order
 * in which stages/training/optimizers.py has them: where rounding is fixed, both give the same bits. */
#include "internal.h"

void et_sgd(float *values, const float *gradient, float *momentum, size_t n, float rate, float share,
            float weight_decay) {
    for (size_t i = 0; i < n; i++) {
        float g = gradient[i];
        if (weight_decay != 0) g += weight_decay * values[i];
        if (momentum) momentum[i] = g = momentum[i] * share + g;
        values[i] -= g * rate;
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
    const float root = et_sqrtf((float)(1 - power(0.999, update))), epsilon = 1e-8f * root;
    const float factor = rate * root / (float)(1 - power(0.9, update)), decay = rate * weight_decay;
    for (size_t i = 0; i < n; i++) {
        float g = gradient[i];
        if (weight_decay != 0 && !decoupled) g += weight_decay * values[i];
        mean[i] += (g - mean[i]) * (float)(1 - 0.9);
        square[i] = square[i] * 0.999f + g * g * (float)(1 - 0.999);
        float move = mean[i] / (et_sqrtf(square[i]) + epsilon) * factor;
        if (weight_decay != 0 && decoupled) move += decay * values[i];
        values[i] -= move;
    }
}

double et_square_sum(const float *values, size_t n) {
    double sums[64] = {0}, sum = 0;
    for (size_t i = 0; i < n; i++) sums[i % 64] += (double)values[i] * (double)values[i];
    for (size_t i = 0; i < 64; i++) sum += sums[i];
    return sum;
}

float et_clip_factor(double squares, float norm) {
    const float factor = norm / (et_sqrtf((float)squares) + 1e-6f);
    return factor < 1.0f ? factor : 1.0f;
}
