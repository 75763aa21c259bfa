/* What the files of the library share: the image's layout, the context, the kernels of one vector width. */
#ifndef ET_INTERNAL_H
#define ET_INTERNAL_H
#include "edgetrain.h"
#include <string.h>

#define ET_MAGIC 0x494e5445u  /* "ETNI" */
#define ET_NONE 0xffffffffu   /* a reference to nothing */
#define ET_MAX_ROWS 64        /* taps of a kernel along rows */
#define ET_MAX_STAGES 16      /* steps of a chain */
#define ET_PANEL 16           /* output channels of a weight panel */
#define ET_CHUNK 16           /* pixels of a transposed chunk */
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

enum { ET_ARENA = 0, ET_CONSTANT = 1, ET_LIVE = 2, ET_GRADIENT = 3 };

enum et_kind {
    ET_INPUT = 1, ET_CHAIN, ET_CONV, ET_DEPTHWISE, ET_MAX_POOL, ET_AVG_POOL, ET_MEAN, ET_UNARY, ET_ADD, ET_COPY,
    ET_TRANSPOSE, ET_MERGE, ET_MASK, ET_FEATURES, ET_MULTIPLY, ET_FILL, ET_SOFTMAX, ET_NORM, ET_NEAREST,
    ET_GATHER, ET_SCATTER, ET_AMAX, ET_MATMUL, ET_GRU, ET_LSTM, ET_PACK, ET_PAGE_OUT,
    ET_GRADIENT_IN = 32, ET_MASK_BACK, ET_CONV_DX, ET_CONV_DW, ET_DEPTHWISE_DX, ET_DEPTHWISE_DW, ET_BIAS_DW,
    ET_MAX_POOL_DX, ET_AVG_POOL_DX, ET_MEAN_DX, ET_UNARY_DX, ET_DOT, ET_SOFTMAX_DX, ET_NORM_DX, ET_NEAREST_DX,
    ET_AMAX_DX, ET_GRU_DX, ET_LSTM_DX, ET_UNPACK, ET_PAGE_IN
};
enum { ET_SAVING = 1, ET_ACCUMULATE = 2, ET_COUNT_PAD = 4, ET_ADAPTIVE = 8, ET_TURNS = 0xff00, ET_FLAGS = 15 | ET_TURNS };
enum et_activation {
    ET_LINEAR = 0, ET_RELU, ET_RELU6, ET_LEAKY_RELU, ET_ELU, ET_HARDSWISH, ET_HARDSIGMOID, ET_SILU, ET_GELU,
    ET_GELU_TANH, ET_SIGMOID, ET_TANH, ET_CLAMP, ET_EXP, ET_SOFTPLUS, ET_MISH, ET_ABS, ET_ACTIVATIONS
};

/* Every field is one 32-bit word, little-endian. */
struct et_step {
    int32_t kind, flags;
    uint32_t x, y, w, b, r, m;        /* references: space in the upper two bits, offset in floats */
    int32_t ci, co, ldx, ldy, ldr;    /* channels; floats from one pixel to the next */
    int32_t hi, wi, ho, wo;
    int32_t kh, kw, sh, sw, ph, pw, dh, dw;
    int32_t act, act2;                /* before and after the addition of r */
    int32_t xr, yr;                   /* rows that x and y hold: fewer than the map's in a chain */
    int32_t n;                        /* a count whose meaning is the kind's */
    int32_t a0, a1;                   /* parameters: integers, or the bits of a float */
};

struct et_header {
    uint32_t magic, version, header_bytes, checksum; /* CRC-32 of all that follows the checksum */
    uint32_t image_bytes, plan, flags, zeros;        /* zeros: floats that are 0 at the start of the constants */
    uint32_t arena, constants, live, kept;           /* floats */
    uint32_t input_channels, input_height, input_width, features;
    uint32_t boundary, boundaries, kept_parts, sums; /* sums: floats behind the live values' gradients */
    uint32_t steps, prefix, suffix, backward;        /* number of steps, and of each part, in this order */
    uint32_t steps_at, constants_at, live_at, parts_at; /* bytes from the image's start */
    uint32_t reserved[4];
};

struct et_part { uint32_t at, length; }; /* floats of the arena: boundaries first, then what is kept */

struct et_kernels;
struct et_net {
    const struct et_header *header;
    const struct et_step *steps;
    const struct et_part *parts;
    const struct et_kernels *kernels;
    float *space[4];
    const void *sample;
    const float *scale, *offset, *gradient;
    float *features;
    et_rows *rows;
    et_update *update;
    void *rows_user, *update_user;
    int input, saving, turn;
    uint32_t seed;
    et_page *page;
    void *page_user;
    int lost; /* the pager failed */
    uint32_t pages;
};

typedef const float *const *et_taps; /* the input row under each tap row, 0 outside of the map */

/* One table per vector width. */
struct et_kernels {
    void (*pointwise)(const struct et_step *, const float *x, const float *w, const float *b, float *y, const float *r,
                      int pixels);
    void (*conv_row)(const struct et_step *, et_taps, const float *w, const float *b, float *y, const float *r,
                     const float *zeros);
    void (*depthwise_row)(const struct et_step *, et_taps, const float *w, const float *b, float *y);
    void (*max_pool_row)(const struct et_step *, et_taps, float *y, uint8_t *index);
    void (*avg_pool_row)(const struct et_step *, et_taps, float *y, int oy);
    void (*add_row)(const struct et_step *, const float *x, const float *r, float *y, int pixels);
    void (*unary)(const struct et_step *, const float *x, float *y, int pixels);
    void (*mean)(const struct et_step *, const float *x, float *y);
    void (*mask)(const float *y, size_t n, int act, uint32_t *bits);
    void (*pack)(const struct et_step *, const float *x, uint32_t seed, float *packed);
    void (*unpack)(const struct et_step *, const float *packed, float *y);
    void (*mask_back)(const float *g, size_t n, const uint32_t *bits, float *y);
    void (*conv_dx)(const struct et_step *, const float *g, const float *w, const float *add, float *dx,
                    float *scratch);
    void (*conv_dw)(const struct et_step *, const float *x, const float *g, float *gw);
    void (*depthwise_dx)(const struct et_step *, const float *g, const float *w, const float *add, float *dx);
    void (*depthwise_dw)(const struct et_step *, const float *x, const float *g, float *gw);
    void (*bias_dw)(const struct et_step *, const float *g, const int32_t *index, float *gb);
    void (*max_pool_dx)(const struct et_step *, const float *g, const uint8_t *index, const float *add, float *dx);
    void (*avg_pool_dx)(const struct et_step *, const float *g, const float *add, float *dx);
    void (*mean_dx)(const struct et_step *, const float *g, const float *add, float *dx);
    void (*unary_dx)(const struct et_step *, const float *x, const float *g, const float *add, float *dx);
    void (*multiply)(const struct et_step *, const float *x, const float *r, const float *add, float *y);
    void (*dot)(const struct et_step *, const float *x, const float *r, const float *add, float *y);
    void (*softmax)(const struct et_step *, const float *x, float *y);
    void (*softmax_dx)(const struct et_step *, const float *y, const float *g, const float *add, float *dx);
    void (*norm)(const struct et_step *, const float *x, float *y, float *room);
    void (*norm_dx)(const struct et_step *, const float *x, const float *g, const float *add, float *dx, float *room);
    void (*nearest)(const struct et_step *, const float *x, float *y);
    void (*nearest_dx)(const struct et_step *, const float *g, const float *add, float *dx);
    void (*gather)(const struct et_step *, const float *x, const int32_t *index, const float *weight, const float *add,
                   float *y);
    void (*scatter)(const struct et_step *, const float *x, const int32_t *index, const float *weight,
                    const float *add, float *y);
    void (*amax)(const struct et_step *, const float *x, float *y);
    void (*amax_dx)(const struct et_step *, const float *x, const float *y, const float *g, const float *add,
                    float *dx);
    void (*matmul)(const struct et_step *, const float *x, const float *b, const float *r, float *y);
    void (*gru)(const struct et_step *, const float *, const float *, const float *, float *, float *);
    void (*gru_dx)(const struct et_step *, const float *, const float *, const float *, float *, float *, float *);
    void (*lstm)(const struct et_step *, const float *, const float *, const float *, float *, float *);
    void (*lstm_dx)(const struct et_step *, const float *, const float *, const float *, float *, float *);
    int width;
};
extern const struct et_kernels et_kernels_1;
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__))
#define ET_X86 1
#endif
#if defined(ET_X86) || defined(__ARM_NEON) || (defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 2))
#define ET_HAS_4 1
extern const struct et_kernels et_kernels_4;
#endif
#ifdef ET_X86
extern const struct et_kernels et_kernels_8, et_kernels_16;
#endif

static inline float et_float(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline float *et_at(const struct et_net *net, uint32_t reference) {
    return reference == ET_NONE ? 0 : net->space[reference >> 30] + (reference & 0x3fffffffu);
}

uint32_t et_piece(const struct et_step *);
int et_check_steps(const struct et_header *, const struct et_step *, const float *constants);
uint32_t et_crc(uint32_t crc, const void *data, uint64_t bytes);

/* The processor's own instruction: rounded correctly everywhere. */
static inline float et_sqrtf(float x) { return __builtin_sqrtf(x); }

/* exp and log of float, the same bits on every machine where products and sums are rounded one by one; without branches,
 * so that compilers make vectors of them. Within 3 units in the last place; exp saturates at e^88. */
static inline float et_expf(float x) {
    const float c = x > 88.0f ? 88.0f : x, v = c > -87.3f ? c : -87.3f;
    const float s = v * 1.44269504f;
    const int32_t n = (int32_t)(s + (s < 0 ? -0.5f : 0.5f));
    const float r = (v - (float)n * 0.693145752f) - (float)n * 1.42860677e-6f;
    const float p = 0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f));
    const float y = (1.0f + r * (1.0f + r * (0.5f + r * p))) * et_float((n + 127) * (1 << 23));
    return x != x ? x : x < -87.3f ? 0.0f : y;
}
#endif
