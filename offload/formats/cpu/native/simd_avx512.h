/* What the templates call, with 16 float32 a vector. `simd_end.h` forgets it. */
#define LANES 16
#define NAME(name) name##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define F __m512
#define ZERO() _mm512_setzero_ps()
#define LOAD(at) _mm512_loadu_ps(at)
#define STORE(at, v) _mm512_storeu_ps(at, v)
#define SPREAD(value) _mm512_set1_ps(value)
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUB(a, b) _mm512_sub_ps(a, b)
#define MUL(a, b) _mm512_mul_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)

#define BF16_EVEN(at) _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(at), 16))
#define BF16_ODD(at)                                                                                                   \
    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at), _mm512_set1_epi32((int)0xFFFF0000)))

#define FROM_BF16(at)                                                                                                  \
    _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(at))), 16))
#define FROM_FP16(at) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(at)))
#define FROM_INT8(at) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at))))

#define NIBBLES_AVX512(bytes) _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_and_si128(bytes, _mm_set1_epi8(15))))
#define FROM_LOW(at) NIBBLES_AVX512(_mm_loadu_si128((const __m128i *)(at)))
#define FROM_HIGH(at) NIBBLES_AVX512(_mm_srli_epi16(_mm_loadu_si128((const __m128i *)(at)), 4))

/* The same number of 32-bit integers. */
#define V __m512i
#define INTEGER_ZERO() _mm512_setzero_si512()
#define INTEGER_ADD(a, b) _mm512_add_epi32(a, b)
#define TO_FLOAT(v) _mm512_cvtepi32_ps(v)
