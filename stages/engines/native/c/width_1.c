/* One float at a time: for compilers and processors without vectors, and to compare the others with. */
#define ET_VL 1
#include "kernels.c"
