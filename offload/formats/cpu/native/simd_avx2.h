/* What the templates call, with 8 float32 a vector. `simd_end.h` forgets it. */
#define LANES 8
#define NAME(name) name##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
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
