/* Four floats: SSE2, NEON, Helium. */
#include "internal.h"
#ifdef ET_HAS_4
#define ET_VL 4
#include "kernels.c"
#endif
