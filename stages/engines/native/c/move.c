/* Values moved by a table, or summed with fixed weights: s->n entries of s->co places each among s->ci floats, -1 for
 * none. */
#include "vector.h"

/* y[i] = add[i] + sum over k of weight[i, k] x[index[i, k]]; a0 stands for what has no place. */
KERNEL gather(const struct et_step *s, const float *x, const int32_t *index, const float *weight, const float *add,
              float *y) {
    const float outside = et_float(s->a0);
    for (int i = 0; i < s->n; i++) {
        float sum = add ? add[i] : 0.0f;
        for (int k = 0; k < s->co; k++, index++) {
            const float value = *index < 0 ? outside : x[*index];
            sum += weight ? *weight++ * value : value;
        }
        y[i] = sum;
    }
}

/* y = add, or 0, and then y[index[i, k]] += weight[i, k] x[i]. */
KERNEL scatter(const struct et_step *s, const float *x, const int32_t *index, const float *weight, const float *add,
               float *y) {
    if (!add) memset(y, 0, sizeof(float) * (size_t)s->ci);
    else if (add != y) memmove(y, add, sizeof(float) * (size_t)s->ci);
    for (int i = 0; i < s->n; i++)
        for (int k = 0; k < s->co; k++, index++) {
            const float share = weight ? *weight++ : 1.0f;
            if (*index >= 0) y[*index] += share * x[i];
        }
}
