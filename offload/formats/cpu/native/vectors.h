/* 8 bfloat16 at a time, with AVX2. */
#ifndef OFFLOAD_VECTORS_H
#define OFFLOAD_VECTORS_H

#include "numbers.h"

__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256 wide(const uint16_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}

/* The nearest bfloat16, even where two are as near, in the lower halves of words; what is no number stays none. */
__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256i rounded(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), none);
}

/* The same as float32. */
__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256 once_rounded(__m256 values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(rounded(values), 16));
}

__attribute__((target("avx2,fma,f16c"))) ALWAYS void put_bf16(uint16_t *at, __m256 values) {
    const __m256i bits = rounded(values);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
    _mm_storeu_si128((__m128i *)at, _mm256_castsi256_si128(words));
}

#endif
