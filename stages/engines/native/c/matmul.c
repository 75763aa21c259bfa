/* The product of two values, as attention has it. */
#include "vector.h"

enum { ROWS = 8 };

/* y (pixels rows of co, ldy apart) = r + a0 * A B; A (rows, ci): ldx apart, or with n = 1 column by column, ldx apart;
 * B (ci, co) without gaps; r ldr apart, 0: one row for all. */
KERNEL matmul(const struct et_step *s, const float *x, const float *b, const float *r, float *y) {
    const int rows = s->hi * s->wi, depth = s->ci, columns = s->co;
    const ptrdiff_t along = s->n ? s->ldx : 1, down = s->n ? 1 : s->ldx;
    const vf scale = vset(et_float(s->a0));
    for (int m = 0; m < rows; m += ROWS) {
        const int left = MIN((int)ROWS, rows - m);
        const float *a[ROWS];
        for (int i = 0; i < ROWS; i++) a[i] = x + (ptrdiff_t)(m + MIN(i, left - 1)) * down; /* the last again: not stored */
        for (int c = 0; c < columns; c += VL) {
            const int n = MIN(VL, columns - c);
            const float *weights = b + c;
            vf s0 = vset(0), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
            for (ptrdiff_t k = 0; k < depth; k++, weights += columns) {
                const vf w = get(weights, n);
                const ptrdiff_t at = k * along;
                s0 += vset(a[0][at]) * w, s1 += vset(a[1][at]) * w, s2 += vset(a[2][at]) * w, s3 += vset(a[3][at]) * w;
                s4 += vset(a[4][at]) * w, s5 += vset(a[5][at]) * w, s6 += vset(a[6][at]) * w, s7 += vset(a[7][at]) * w;
            }
            const vf sums[ROWS] = {s0, s1, s2, s3, s4, s5, s6, s7};
            for (int i = 0; i < left; i++) {
                const vf value = scale * sums[i];
                put(y + (ptrdiff_t)(m + i) * s->ldy + c, n, r ? value + get(r + (ptrdiff_t)(m + i) * s->ldr + c, n) : value);
            }
        }
    }
}
