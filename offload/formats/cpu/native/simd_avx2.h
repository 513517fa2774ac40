/* What the templates call, with 8 float32 a vector. `simd_end.h` forgets the macros. */
#ifndef OFFLOAD_SIMD_AVX2_H
#define OFFLOAD_SIMD_AVX2_H

#include "numbers.h"

/* The nearest bfloat16, even where two are as near, in the lower halves of words; what is no number stays none. */
TARGET_LEAST ALWAYS __m256i rounded_avx2(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), none);
}

/* The same as float32. */
TARGET_LEAST ALWAYS __m256 once_rounded_avx2(__m256 values) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(rounded_avx2(values), 16));
}

TARGET_LEAST ALWAYS void put_bf16_avx2(uint16_t *at, __m256 values) {
    const __m256i bits = rounded_avx2(values);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
    _mm_storeu_si128((__m128i *)at, _mm256_castsi256_si128(words));
}

/* Sums over the lanes of 8 vectors. */
TARGET_LEAST ALWAYS __m256 sums_of_avx2(const __m256 *v) {
    const __m256 a = _mm256_hadd_ps(v[0], v[1]), b = _mm256_hadd_ps(v[2], v[3]);
    const __m256 c = _mm256_hadd_ps(v[4], v[5]), d = _mm256_hadd_ps(v[6], v[7]);
    const __m256 first = _mm256_hadd_ps(a, b), second = _mm256_hadd_ps(c, d);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
}

#endif

#define LANES 8
#define NAME(name) name##_avx2
#define TARGET TARGET_LEAST
#define F __m256
#define ZERO() _mm256_setzero_ps()
#define LOAD(at) _mm256_loadu_ps(at)
#define STORE(at, v) _mm256_storeu_ps(at, v)
#define SPREAD(value) _mm256_set1_ps(value)
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUB(a, b) _mm256_sub_ps(a, b)
#define MUL(a, b) _mm256_mul_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)

/* 16 bfloat16: those at even places, those at odd ones. */
#define BF16_EVEN(at) _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)(at)), 16))
#define BF16_ODD(at)                                                                                                   \
    _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i *)(at)), _mm256_set1_epi32((int)0xFFFF0000)))

/* 8 of them, in order. */
#define FROM_BF16(at)                                                                                                  \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(at))), 16))
#define FROM_FP16(at) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(at)))
#define FROM_INT8(at) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(at))))

/* The low, or the high, halves of 8 bytes. */
#define NIBBLES_AVX2(bytes) _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))))
#define FROM_LOW(at) NIBBLES_AVX2(_mm_loadl_epi64((const __m128i *)(at)))
#define FROM_HIGH(at) NIBBLES_AVX2(_mm_srli_epi16(_mm_loadl_epi64((const __m128i *)(at)), 4))

/* The same number of 32-bit integers. */
#define V __m256i
#define INTEGER_ZERO() _mm256_setzero_si256()
#define INTEGER_ADD(a, b) _mm256_add_epi32(a, b)
#define TO_FLOAT(v) _mm256_cvtepi32_ps(v)

/* What kernels of 8 numbers call beside. */
#define DIV(a, b) _mm256_div_ps(a, b)
#define SQRT(v) _mm256_sqrt_ps(v)
#define MIN(a, b) _mm256_min_ps(a, b)
#define MAX(a, b) _mm256_max_ps(a, b)
#define NEAREST(v) _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)

/* 2 to whole numbers. */
#define POWER_OF_2(n)                                                                                                  \
    _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23))

/* `then`, but zero where v is `value`. */
#define UNLESS(v, value, then) _mm256_and_ps(then, _mm256_cmp_ps(v, value, _CMP_NEQ_UQ))

/* Rounded to bfloat16, and still float32; as bfloat16; and sums over the lanes of 8 vectors. */
#define ONCE_ROUNDED(v) once_rounded_avx2(v)
#define PUT_BF16(at, v) put_bf16_avx2(at, v)
#define PUT_SUMS(at, v) _mm256_storeu_ps(at, sums_of_avx2(v))
