/* AVX2 comes with FMA and F16C, AVX-512 with what Skylake's servers had first; bfloat16 products are a level more. NEON
 * is on every aarch64 processor; dot products of 8-bit integers and then of bfloat16 came later. */
#include "level.h"

#ifdef __x86_64__

#include <cpuid.h>

static int has_avxvnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static int of_processor(void) {
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
        return LEVEL_NONE;
    if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
        return LEVEL_AVX2;
    return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
}

/* AVX-512 has it since Ice Lake. Of what has AVX2 alone, only Intel's processors since Alder Lake have, so a processor
 * that is held to AVX2 has not. */
static int has_vnni(int level) {
    if (level >= LEVEL_AVX512)
        return __builtin_cpu_supports("avx512vnni") != 0;
    return level == LEVEL_AVX2 && of_processor() == level && has_avxvnni();
}

#else

#ifdef __linux__
#include <sys/auxv.h>

enum { ASIMDDP = 1 << 20 /* of AT_HWCAP */, BF16 = 1 << 14 /* of AT_HWCAP2 */ };

static int of_processor(void) {
    if (!(getauxval(AT_HWCAP) & ASIMDDP))
        return LEVEL_NEON;
    return getauxval(AT_HWCAP2) & BF16 ? LEVEL_NEON_BF16 : LEVEL_NEON_DOTPROD;
}
#else
static int of_processor(void) { return LEVEL_NEON; }
#endif

static int has_vnni(int level) { return (void)level, 0; }

#endif

int level_in_use, vnni_in_use;

int level_choose(int most) {
    int has = of_processor();
    level_in_use = has < most ? has : most;
    vnni_in_use = has_vnni(level_in_use);
    return level_in_use;
}

__attribute__((constructor)) static void start(void) { level_choose(LEVEL_BEST); }
