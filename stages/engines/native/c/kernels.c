/* All kernels of one vector width: included by width_*.c, which say which. */
#include "conv.c"
#include "depthwise.c"
#include "pool.c"
#include "elementwise.c"
#include "norm.c"
#include "recurrent.c"
#include "move.c"
#include "matmul.c"

#define ET_TABLE_(width) et_kernels_##width
#define ET_TABLE(width) ET_TABLE_(width)
const struct et_kernels ET_TABLE(ET_VL) = {
    pointwise, conv_row, depthwise_row, max_pool_row, avg_pool_row, add_row, unary, mean, mask, pack, unpack, mask_back, conv_dx,
    conv_dw, depthwise_dx, depthwise_dw, bias_dw, max_pool_dx, avg_pool_dx, mean_dx, unary_dx,
    multiply, dot, softmax, softmax_dx, norm, norm_dx, nearest, nearest_dx,
    gather, scatter, amax, amax_dx, matmul, gru, gru_dx, lstm, lstm_dx, ET_VL,
};
