/* AVX2 comes with FMA and F16C, AVX-512 with what Skylake's servers had first; bfloat16 products are a level more. */
#include "level.h"

#if defined(__x86_64__) && defined(__GNUC__)

static int of_processor(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return LEVEL_NONE;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return LEVEL_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
}

#else

static int of_processor(void) { return LEVEL_NONE; }

#endif

int level_in_use;

__attribute__((constructor)) static void start(void) { level_in_use = of_processor(); }

int level_choose(int most) {
    int has = of_processor();
    return level_in_use = has < most ? has : most;
}
