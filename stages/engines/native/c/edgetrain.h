/* EdgeTrain's native engine: runs and trains a neural network from a program image.
 *
 * An image (docs/native.md) is data: a header, a table of steps, constant weights, and the first values of what trains.
 * Lowering made it for one graph and one plan. This library executes it, one sample at a time, in memory that the
 * caller owns. It allocates nothing, holds no globals, starts no threads and needs nothing of libc but memcpy,
 * memmove and memset (exp and log are its own: those of libcs differ in the last bit). Kernels copy with memmove: a
 * damaged image may name places that overlap.
 *
 *     struct et_sizes sizes;
 *     if (et_inspect(image, bytes, &sizes)) ...                      the image is whole and stays within its buffers
 *     et_open(net, image, bytes, memory of sizes.context_bytes, ...)
 *     et_reset(net)                                                  live values as the image has them
 *     et_prefix(net, pixels, 0); et_forward(net, 0, features);       nothing leaves the arena in between
 *     loss and its gradient at the features: et_softmax_loss, et_prototype_loss, or the caller's own
 *     et_backward(net, gradient);                                    adds to the live values' gradients
 *     et_sgd(live, gradients, ...)
 *
 * All memory that a call may write is passed to et_open or to the call itself. Every function that can fail gives an
 * enum et_code. */
#ifndef EDGETRAIN_H
#define EDGETRAIN_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ET_API __declspec(dllexport)
#else
#define ET_API __attribute__((visibility("default")))
#endif

#define ET_VERSION 3        /* of the image's format: an image of another one is refused */
#define ET_ALIGN 64         /* bytes: image, arena, live values and gradients begin at such an address */

enum et_code {
    ET_OK = 0,
    ET_BAD_MAGIC = 1,       /* not a program image */
    ET_BAD_VERSION = 2,     /* of another version of the format */
    ET_TRUNCATED = 3,       /* shorter than its header says, or sections beyond its end */
    ET_BAD_CHECKSUM = 4,    /* damaged */
    ET_BAD_HEADER = 5,      /* sizes that cannot be */
    ET_BAD_STEP = 6,        /* a step that would leave its buffers, or makes no sense */
    ET_UNSUPPORTED = 7,     /* a kind or a flag that this library does not have */
    ET_SMALL = 8,           /* memory too small */
    ET_UNALIGNED = 9,       /* memory not aligned to ET_ALIGN */
    ET_NO_WIDTH = 10,       /* this processor has no vectors of that width */
    ET_BAD_ARGUMENT = 11,
    ET_LOST_PAGE = 12       /* et_set_pager's function failed */
};

/* What an image asks for. Lengths are in floats where the name does not say bytes. */
struct et_sizes {
    uint64_t context_bytes, arena_bytes, kept_bytes, constant_bytes, image_bytes;
    uint32_t input, boundary, features, live, steps, plan, sums;
    uint32_t piece; /* the most gradients that one step of the backward pass makes: room of et_set_update */
    uint32_t pages; /* floats that et_set_pager's function is given to hold for one sample; 0: it is not needed */
};

enum et_input { /* how samples lie in memory */
    ET_FLOAT_CHW = 0,       /* float32, as PyTorch has them */
    ET_FLOAT_HWC = 1,
    ET_BYTES_HWC = 2        /* uint8, brought to value * scale[c] + offset[c] on the way in */
};

struct et_net; /* opaque, in the caller's memory */

/* ET_VERSION, for those who load the library without this header. */
ET_API int et_version(void);
/* The widest vectors that this processor and this build have: 1, 4, 8 or 16 floats. */
ET_API int et_width(void);
/* 1 where products and sums are rounded one by one, so that every machine gives the same bits. */
ET_API int et_same_bits(void);
ET_API const char *et_message(int code);

/* Checks the whole image: nothing that et_open accepts can make a later call leave its buffers. */
ET_API int et_inspect(const void *image, uint64_t bytes, struct et_sizes *sizes);
/* width: 0 for the widest. live holds sizes.live floats; gradient sizes.live + sizes.sums, or is 0 for a net that only
 * computes features. The image must stay in place. */
ET_API int et_open(struct et_net **net, const void *image, uint64_t bytes, void *context, uint64_t context_bytes,
                   void *arena, uint64_t arena_bytes, float *live, float *gradient, int width);
/* Live values as the image has them; gradients 0 where they are added up (not after et_set_update). */
ET_API void et_reset(struct et_net *net);
/* How et_prefix reads its samples; scale and offset (one per channel) are read at each call and must stay in place. */
ET_API int et_set_input(struct et_net *net, int input, const float *scale, const float *offset);
/* A sample that is never whole in memory: rows are asked for from the first to the last, each once, and lie as
 * et_set_input says, channels last (ET_FLOAT_CHW is refused). et_prefix then takes no sample. rows 0: samples again. */
typedef const void *et_rows(void *user, int row);
ET_API int et_set_rows(struct et_net *net, et_rows *rows, void *user);
/* Updates during the backward pass, where one sample is one update: as soon as a part of the gradient is complete and
 * its values are read no more, update gets it, sizes.piece floats at most: live values at live[0..count), which are
 * number first and the following of all, with their gradient. Then et_open's gradient needs no more than sizes.piece
 * floats. Refused where the image asks for sums. update 0: gradients are added up again. */
typedef void et_update(void *user, float *live, const float *gradient, size_t first, size_t count);
ET_API int et_set_update(struct et_net *net, et_update *update, void *user);

/* Where values lie that the image keeps outside of the arena, between et_forward and et_backward of a sample: page gets
 * count of them to hold at place at (of sizes.pages), or, with in set, brings them back. Not 0: it could not, and the
 * pass ends with ET_LOST_PAGE. */
typedef int et_page(void *user, int in, size_t at, float *values, size_t count);
ET_API int et_set_pager(struct et_net *net, et_page *page, void *user);

/* One sample -> what enters the trained part: left in the arena and, where boundary is not 0, copied there. */
ET_API int et_prefix(struct et_net *net, const void *sample, float *boundary);
/* The trained part. boundary 0: what et_prefix left in the arena. et_forward keeps what et_backward needs. */
ET_API int et_suffix(struct et_net *net, const float *boundary, float *features);
ET_API int et_forward(struct et_net *net, const float *boundary, float *features);
/* From the gradient at the features, after et_forward of the same sample: adds to the live values' gradients, and sets
 * the sizes.sums floats behind them where the image asks for sums over channels. */
ET_API int et_backward(struct et_net *net, const float *gradient);
/* Which of the weight gradients that the image gives numbers from 1 on et_backward adds up, and leaves the others as they
 * are: where channels take turns in training. 0: all of them, as at first. */
ET_API int et_set_turn(struct et_net *net, int turn);
/* What et_forward rounds by where the image keeps values in 8 or 16 bits: another number for every sample. */
ET_API void et_set_seed(struct et_net *net, uint32_t seed);
/* Steps first to first + count of the table again, on what the calls above left in the arena and with the sample,
 * features and gradient of them: to see how long each takes. first must not lie within a chain. */
ET_API int et_run(struct et_net *net, uint32_t first, uint32_t count);
/* What et_forward kept (sizes.kept_bytes), taken out and put back, so that one arena serves a batch. */
ET_API void et_keep(struct et_net *net, void *kept);
ET_API void et_restore(struct et_net *net, const void *kept);

/* Optimisers, over n values in place. Gradients are left as they are. momentum: n floats, zeros at first, or 0. */
ET_API void et_sgd(float *values, const float *gradient, float *momentum, size_t n, float rate, float share,
                   float weight_decay);
/* Adam with beta 0.9 and 0.999, epsilon 1e-8; mean and square: n floats each, zeros at first; update counts from 1;
 * decoupled: AdamW. */
ET_API void et_adam(float *values, const float *gradient, float *mean, float *square, size_t n, float rate,
                    float weight_decay, int decoupled, uint32_t update);
/* The sum of squares of a gradient; and what brings gradients with this sum down to a norm, 1 at most: 0 where theirs is
 * above 1.8e19. */
ET_API double et_square_sum(const float *values, size_t n);
ET_API float et_clip_factor(double squares, float norm);

/* Heads. features (n, d). */
/* logits (n, c) = features weight^T + bias; weight (c, d), bias (c) or 0. */
ET_API void et_linear(const float *features, const float *weight, const float *bias, float *logits, size_t n, size_t d,
                      size_t c);
/* Sum of w_i * cross entropy; gradient (n, c) at the logits, which may be the logits themselves; weights 0: 1/n each. */
ET_API float et_softmax_loss(const float *logits, const int32_t *labels, const float *weights, float *gradient,
                             size_t n, size_t c);
/* Gradients of a linear head from that at its logits: added to weight's and bias's (either may be 0), set at features. */
ET_API void et_linear_gradients(const float *features, const float *weight, const float *gradient, float *weight_gradient,
                                float *bias_gradient, float *feature_gradient, size_t n, size_t d, size_t c);
/* ProtoNet's loss of a support set and its pseudo-query, cosine, scaled: features (2n, d), the support's first; labels
 * (n) below ways. Gradient (2n, d) through the prototypes too; work: ways * (2 d + 2) floats. */
ET_API int et_prototype_loss(const float *features, const int32_t *labels, float *gradient, float *work, size_t n,
                             size_t d, size_t ways, float scale, float *loss);
/* Norm of each sample's gradient of a linear head's weight and bias in closed form: importance (n). */
ET_API void et_last_layer_importance(const float *features, const float *logits, const int32_t *labels,
                                     float *importance, size_t n, size_t d, size_t c);
/* Per channel, adds (sum over positions of value * gradient)^2: what the Fisher potential sums. (p, c) each. */
ET_API void et_squared_sums(const float *values, const float *gradient, float *sums, size_t p, size_t c);
ET_API float et_exp(float x);
ET_API float et_log(float x);

/* What training leaves is a slot: 8 words, the live values, the values of a head. The words of the values as they are:
 * magic, the plan's mark, the image's checksum, live floats, head floats, a number that grows from one save to the next,
 * 0, and a checksum of all. To load a slot, compare its words with these before (all but the last two: of another image
 * or head) and after its values were read (damaged: et_reset). Two slots that are written in turn survive a power cut:
 * the whole one with the higher number is the last. */
ET_API void et_slot(const struct et_net *net, const float *head, size_t head_floats, uint32_t number, uint32_t words[8]);

#ifdef __cplusplus
}
#endif
#endif
