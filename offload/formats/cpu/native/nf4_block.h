/* What both ways to compute with NF4 matrices do with 8 numbers at a time: blocks of x as integers, vectors of rows in
 * order. */
#ifndef OFFLOAD_NF4_BLOCK_H
#define OFFLOAD_NF4_BLOCK_H

#include "nf4.h"
#include "simd_8.h"

#include <float.h>
#include <string.h>

#ifdef __x86_64__

/* Unpacking with AVX2 leaves rows 0-3 and 8-11 in one vector, 4-7 and 12-15 in the next. */
TARGET ALWAYS void ordered_avx2(F *v, int vectors) {
    for (int i = 0; i < vectors; i += 2) {
        const F first = _mm256_permute2f128_ps(v[i], v[i + 1], 0x20);
        v[i + 1] = _mm256_permute2f128_ps(v[i], v[i + 1], 0x31);
        v[i] = first;
    }
}

/* The larger of one and the amount of other numbers, as bits. */
TARGET ALWAYS V larger(V bits, F values) {
    return _mm256_max_epi32(bits, _mm256_castps_si256(_mm256_andnot_ps(SPREAD(-0.f), values)));
}

/* The nearest integers, even ones where two are as near. */
TARGET ALWAYS V nearest(F values) { return _mm256_cvtps_epi32(values); }

TARGET ALWAYS void put_int16(void *at, V low, V high) {
    _mm256_storeu_si256((__m256i *)at, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8));
}

/* 32 numbers, and what they are without their signs. */
TARGET ALWAYS void put_int8(void *at, void *amounts, const V *v) {
    const V bytes = _mm256_permutevar8x32_epi32(
        _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3])),
        _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256((__m256i *)at, bytes);
    _mm256_storeu_si256((__m256i *)amounts, _mm256_abs_epi8(bytes));
}

#else

ALWAYS int32x4_t larger_neon(int32x4_t bits, float32x4_t values) {
    return vmaxq_s32(bits, vreinterpretq_s32_f32(vabsq_f32(values)));
}
ALWAYS V larger(V bits, F values) { return (V){larger_neon(bits.a, values.a), larger_neon(bits.b, values.b)}; }
ALWAYS V nearest(F values) { return (V){vcvtnq_s32_f32(values.a), vcvtnq_s32_f32(values.b)}; }
ALWAYS int16x8_t narrow_neon(V v) { return vcombine_s16(vmovn_s32(v.a), vmovn_s32(v.b)); }

ALWAYS void put_int16(void *at, V low, V high) {
    vst1q_s16(at, narrow_neon(low)), vst1q_s16((int16_t *)at + 8, narrow_neon(high));
}

ALWAYS void put_int8(void *at, void *amounts, const V *v) {
    for (int half = 0; half < 2; half++) {
        const int8x8_t first = vmovn_s16(narrow_neon(v[2 * half])), second = vmovn_s16(narrow_neon(v[2 * half + 1]));
        vst1q_s8((int8_t *)at + 16 * half, vcombine_s8(first, second));
        vst1q_s8((int8_t *)amounts + 16 * half, vabsq_s8(vcombine_s8(first, second)));
    }
}

#endif

/* The largest amount of a block's numbers: what is no number is the largest of all. */
TARGET ALWAYS float largest_of(const float *values) {
    V largest = INTEGER_ZERO();
    UNROLL
    for (int i = 0; i < BLOCK; i += 8)
        largest = larger(largest, LOAD(values + i));
    int32_t lanes[8], most = 0;
    memcpy(lanes, &largest, sizeof lanes);
    for (int i = 0; i < 8; i++)
        most = lanes[i] > most ? lanes[i] : most;
    float amount;
    memcpy(&amount, &most, sizeof amount);
    return amount;
}

/* A block's scale where it has no integers: nothing but zeros, or no number at all. */
static inline float without_integers(float amount) { return amount > 0 || amount != amount ? amount - amount : 0; }

#include "simd_end.h"

#endif
