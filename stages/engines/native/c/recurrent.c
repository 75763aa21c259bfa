/* The cells of recurrent layers, one step of time each; the products with weights are steps of their own. */
#include "vector.h"

/* Gated recurrent units: x and u are what inputs and hidden state add to the gates (reset, update, new), h the state
 * before. kept: both gates, the new value, and what the state adds to it. */
KERNEL gru(const struct et_step *s, const float *x, const float *u, const float *h, float *y, float *kept) {
    const ptrdiff_t units = s->ci;
    for (ptrdiff_t c = 0; c < units; c += VL) {
        const int n = (int)MIN((ptrdiff_t)VL, units - c);
        const vf r = vsigmoid(get(x + c, n) + get(u + c, n));
        const vf z = vsigmoid(get(x + units + c, n) + get(u + units + c, n));
        const vf told = get(u + 2 * units + c, n), value = vtanh(get(x + 2 * units + c, n) + r * told);
        put(y + c, n, (1.0f - z) * value + z * get(h + c, n));
        put(kept + c, n, r), put(kept + units + c, n, z);
        put(kept + 2 * units + c, n, value), put(kept + 3 * units + c, n, told);
    }
}

/* From the gradient g of the state: those of x and of u, and what passes to the state before beside its weights. */
KERNEL gru_dx(const struct et_step *s, const float *kept, const float *h, const float *g, float *dx, float *du, float *dh) {
    const ptrdiff_t units = s->ci;
    for (ptrdiff_t c = 0; c < units; c += VL) {
        const int n = (int)MIN((ptrdiff_t)VL, units - c);
        const vf r = get(kept + c, n), z = get(kept + units + c, n), value = get(kept + 2 * units + c, n);
        const vf d = get(g + c, n), dn = d * (1.0f - z) * (1.0f - value * value);
        const vf dz = d * (get(h + c, n) - value) * z * (1.0f - z);
        const vf dr = dn * get(kept + 3 * units + c, n) * r * (1.0f - r);
        put(dx + c, n, dr), put(dx + units + c, n, dz), put(dx + 2 * units + c, n, dn);
        put(du + c, n, dr), put(du + units + c, n, dz), put(du + 2 * units + c, n, dn * r);
        put(dh + c, n, d * z);
    }
}

/* Long short-term memory: gates input, forget, cell, output; c0 is the cell before, and may lie where kept has the new
 * one. kept: the four gates, the cell, and its tanh. */
KERNEL lstm(const struct et_step *s, const float *x, const float *u, const float *c0, float *y, float *kept) {
    const ptrdiff_t units = s->ci;
    for (ptrdiff_t c = 0; c < units; c += VL) {
        const int n = (int)MIN((ptrdiff_t)VL, units - c);
        const vf i = vsigmoid(get(x + c, n) + get(u + c, n));
        const vf f = vsigmoid(get(x + units + c, n) + get(u + units + c, n));
        const vf g = vtanh(get(x + 2 * units + c, n) + get(u + 2 * units + c, n));
        const vf o = vsigmoid(get(x + 3 * units + c, n) + get(u + 3 * units + c, n));
        const vf cell = f * get(c0 + c, n) + i * g, squashed = vtanh(cell);
        put(y + c, n, o * squashed);
        put(kept + c, n, i), put(kept + units + c, n, f), put(kept + 2 * units + c, n, g);
        put(kept + 3 * units + c, n, o), put(kept + 4 * units + c, n, cell), put(kept + 5 * units + c, n, squashed);
    }
}

/* From the gradient g of the state and dc of the cell (n = 0: none): those of the gates, and dc of the cell before. */
KERNEL lstm_dx(const struct et_step *s, const float *kept, const float *c0, const float *g, float *dx, float *dc) {
    const ptrdiff_t units = s->ci;
    for (ptrdiff_t c = 0; c < units; c += VL) {
        const int n = (int)MIN((ptrdiff_t)VL, units - c);
        const vf i = get(kept + c, n), f = get(kept + units + c, n), v = get(kept + 2 * units + c, n);
        const vf o = get(kept + 3 * units + c, n), squashed = get(kept + 5 * units + c, n), d = get(g + c, n);
        const vf passed = d * o * (1.0f - squashed * squashed), cell = s->n ? get(dc + c, n) + passed : passed;
        put(dx + c, n, cell * v * i * (1.0f - i)), put(dx + units + c, n, cell * get(c0 + c, n) * f * (1.0f - f));
        put(dx + 2 * units + c, n, cell * i * (1.0f - v * v)), put(dx + 3 * units + c, n, d * squashed * o * (1.0f - o));
        put(dc + c, n, cell * f);
    }
}
