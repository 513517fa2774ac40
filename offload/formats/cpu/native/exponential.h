/* e^x of 8 float32, without a library: the same bits on every processor. */
#ifndef OFFLOAD_EXPONENTIAL_H
#define OFFLOAD_EXPONENTIAL_H

#include "numbers.h"

/* To two units in the last place for x from -87 to 88, and the ends' values beyond. */
__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256 exponential(__m256 x) {
    x = _mm256_max_ps(_mm256_min_ps(_mm256_set1_ps(88), x), _mm256_set1_ps(-87));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.f / 720);
    const float rest[] = {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1, 1};
    UNROLL
    for (int i = 0; i < 6; i++)
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(rest[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

#endif
