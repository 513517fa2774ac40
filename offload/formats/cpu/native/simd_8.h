/* What is written for 8 float32 a vector, with the narrowest instructions that there are. `simd_end.h` forgets it. */
#ifdef __x86_64__
#include "simd_avx2.h"
#else
#include "simd_neon.h"
#endif
