/* What both ways to compute with NF4 matrices do with AVX2: blocks of x as integers, vectors of rows in order. */
#ifndef OFFLOAD_NF4_BLOCK_H
#define OFFLOAD_NF4_BLOCK_H

#include "nf4.h"
#include "numbers.h"

#include <float.h>
#include <string.h>

#define TARGET_BLOCK __attribute__((target("avx2,fma,f16c")))

/* Unpacking with AVX2 leaves rows 0-3 and 8-11 in one vector, 4-7 and 12-15 in the next. */
TARGET_BLOCK ALWAYS void ordered_avx2(__m256 *v, int vectors) {
    for (int i = 0; i < vectors; i += 2) {
        const __m256 first = _mm256_permute2f128_ps(v[i], v[i + 1], 0x20);
        v[i + 1] = _mm256_permute2f128_ps(v[i], v[i + 1], 0x31);
        v[i] = first;
    }
}

/* The largest amount of a block's numbers: what is no number is the largest of all. */
TARGET_BLOCK ALWAYS float largest_of(const float *values) {
    const __m256 sign = _mm256_set1_ps(-0.f);
    __m256i largest = _mm256_setzero_si256();
    UNROLL
    for (int i = 0; i < BLOCK; i += 8)
        largest = _mm256_max_epi32(largest,
                                   _mm256_castps_si256(_mm256_andnot_ps(sign, _mm256_loadu_ps(values + i))));
    int32_t lanes[8], most = 0;
    _mm256_storeu_si256((__m256i *)lanes, largest);
    for (int i = 0; i < 8; i++)
        most = lanes[i] > most ? lanes[i] : most;
    float amount;
    memcpy(&amount, &most, sizeof amount);
    return amount;
}

/* A block's scale where it has no integers: nothing but zeros, or no number at all. */
static inline float without_integers(float amount) { return amount > 0 || amount != amount ? amount - amount : 0; }

#endif
