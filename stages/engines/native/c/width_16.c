/* Sixteen floats: AVX-512. Nothing of this file runs where the processor has none. */
#include "internal.h"
#ifdef ET_X86
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif
#define ET_VL 16
#include "kernels.c"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
