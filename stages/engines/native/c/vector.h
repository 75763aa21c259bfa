/* Vectors of ET_VL floats by GCC's extensions; one float where there are none. Lanes are always outputs (channels or
 * pixels), never summands: every result is summed in the same order whatever the width, so that with products and sums
 * rounded one by one (-ffp-contract=off) all widths and machines agree bit for bit. */
#ifndef ET_VECTOR_H
#define ET_VECTOR_H
#include "internal.h"
#if ET_VL >= 8
#include <immintrin.h>
#endif

#define VL ET_VL
#define INL static inline __attribute__((always_inline))
#define KERNEL static __attribute__((noinline, unused)) void

#if VL == 1
typedef float vf;
typedef int32_t vi;
#define VI(i) ((vi)(i))
#define VCMP(c) (-(vi)(c)) /* of a comparison: all bits, or none */
INL vf choose(vi mask, vf yes, vf no) { return mask ? yes : no; }
INL vf vld(const float *p) { return *p; }
INL void vst(float *p, vf v) { *p = v; }
INL vf vset(float s) { return s; }
INL vi vint(vf v) { return (int32_t)v; }
INL vf vfloat(vi v) { return (float)v; }
INL vf vbits(vi v) { return et_float(v); }
INL vf vact(vf v, int act) { return act && v < 0 ? 0 : act == ET_RELU6 && v > 6 ? 6 : v; }
#else
typedef float vf __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
#define VI(i) ((int32_t)(i) - (vi){0})
#define VCMP(c) (c)
INL vf choose(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INL vf vld(const float *p) { return *(const vfu *)(const void *)p; }
INL void vst(float *p, vf v) { *(vfu *)(void *)p = v; }
INL vf vset(float s) { return s - (vf){0}; }
INL vi vint(vf v) { return __builtin_convertvector(v, vi); }
INL vf vfloat(vi v) { return __builtin_convertvector(v, vf); }
INL vf vbits(vi v) { return (vf)v; }
INL vf vact(vf v, int act) { /* a value that is no number stays one */
    if (act) {
        v = (vf)((vi)v & ~(vi)(v < 0));
        if (act == ET_RELU6) {
            vi above = (vi)(v > 6);
            v = (vf)(((vi)v & ~above) | ((vi)vset(6) & above));
        }
    }
    return v;
}
#endif

/* The first n lanes of a vector; those of a load that are not read are 0. */
#if VL == 16
INL void put(float *y, int n, vf v) {
    if (n >= VL) vst(y, v);
    else _mm512_mask_storeu_ps(y, (__mmask16)((1u << n) - 1u), (__m512)v);
}
INL vf get(const float *x, int n) {
    return n >= VL ? vld(x) : (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), x);
}
#elif VL == 8
INL __m256i lanes(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INL void put(float *y, int n, vf v) {
    if (n >= VL) vst(y, v);
    else _mm256_maskstore_ps(y, lanes(n), (__m256)v);
}
INL vf get(const float *x, int n) { return n >= VL ? vld(x) : (vf)_mm256_maskload_ps(x, lanes(n)); }
#else
INL void put(float *y, int n, vf v) {
    if (n >= VL) vst(y, v);
    else {
        float t[VL];
        vst(t, v);
        for (int i = 0; i < n; i++) y[i] = t[i];
    }
}
INL vf get(const float *x, int n) {
    float t[VL] = {0};
    if (n >= VL) return vld(x);
    for (int i = 0; i < n; i++) t[i] = x[i];
    return vld(t);
}
#endif

/* The register tile: MR rows (pixels or channels) of NVT vectors, as macros, because named variables stay in registers
 * at every level of optimisation. HALF is a tile of half as many rows. */
#if VL == 16
#define MR 8
#define NVT 1
#define FOR_R(F) F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
#define FOR_V(F, r) F(r, 0)
#elif VL == 8
#define MR 6
#define NVT 2
#define FOR_R(F) F(0) F(1) F(2) F(3) F(4) F(5)
#define FOR_V(F, r) F(r, 0) F(r, 1)
#elif VL == 4 && defined(__aarch64__)
#define MR 4
#define NVT 4
#define FOR_R(F) F(0) F(1) F(2) F(3)
#define FOR_V(F, r) F(r, 0) F(r, 1) F(r, 2) F(r, 3)
#elif VL == 4
#define MR 4
#define NVT 2
#define FOR_R(F) F(0) F(1) F(2) F(3)
#define FOR_V(F, r) F(r, 0) F(r, 1)
#else
#define MR 4
#define NVT 4
#define FOR_R(F) F(0) F(1) F(2) F(3)
#define FOR_V(F, r) F(r, 0) F(r, 1) F(r, 2) F(r, 3)
#endif
#define TW (NVT * VL) /* columns of a tile; divides ET_PANEL */
#if MR == 8
#define HR 4
#define FOR_H(F) F(0) F(1) F(2) F(3)
#elif MR == 6
#define HR 3
#define FOR_H(F) F(0) F(1) F(2)
#else
#define HR 2
#define FOR_H(F) F(0) F(1)
#endif
#define ACC(r, v) a##r##_##v
#define WGT(v) w##v
#endif
