/* Products of few rows with NF4 matrices on x86 CPUs: y = x W^T, several matrices at once.
 *
 * A matrix [n, k] lies as `offload.formats.cpu.nf4` packs it. For each 32 rows and each pair of inputs there are 32
 * bytes, two for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones. `absmax` is
 * bfloat16 [k / 64, n]. x and y are bfloat16; sums are float32, block by block of 64 inputs. Each weight is read once for
 * up to four rows of x. n is a multiple of 32, k of 64.
 */
#include "pool.h"

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

enum { BLOCK = 64, ROWS = 32, TOKENS = 4, AHEAD = 4096 /* bytes that are asked for before they are needed */ };

typedef struct {
    const uint16_t *x;     /* [m, k] */
    const uint8_t *codes;  /* [n, k / 2] */
    const uint16_t *absmax; /* [k / 64, n] */
    uint16_t *y;           /* [m, n] */
    int64_t m, n, k;
} Product;

typedef struct {
    const Product *products;
    int count;
    const uint16_t *levels; /* the 16 levels, bfloat16 */
} Job;

typedef void (*Rows)(const Product *product, int64_t first, int64_t token, const uint16_t *levels);

/* ---- AVX-512 with bfloat16 products ---- */

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

AVX512 static inline __m512 wide512(const uint16_t *values) {
    __m256i bits = _mm256_loadu_si256((const __m256i *)values);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* 32 rows of W with `tokens` rows of x. Sums of even and odd pairs are kept apart, as one waits for the one before. */
AVX512 static inline __attribute__((always_inline)) void rows512(
    const Product *p, int64_t first, int64_t token, const uint16_t *levels, const int tokens) {
    const __m256i half = _mm256_loadu_si256((const __m256i *)levels);
    const __m512i table = _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
    const uint8_t *codes = p->codes + first * (p->k / 2);
    const uint16_t *absmax = p->absmax + first;
    const uint16_t *x = p->x + token * p->k;
    __m512 low[TOKENS], high[TOKENS];
    for (int t = 0; t < tokens; t++)
        low[t] = high[t] = _mm512_setzero_ps();
    for (int64_t at = 0; at < p->k; at += BLOCK, codes += BLOCK / 2 * ROWS, absmax += p->n) {
        __m512 a[TOKENS], b[TOKENS], c[TOKENS], d[TOKENS];
        for (int t = 0; t < tokens; t++)
            a[t] = b[t] = c[t] = d[t] = _mm512_setzero_ps();
        for (int pair = 0; pair < BLOCK / 2; pair += 2) {
            const uint8_t *here = codes + pair * ROWS;
            _mm_prefetch((const char *)(here + AHEAD), _MM_HINT_T0);
            __m512i even = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)here));
            __m512i odd = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(here + ROWS)));
            __m512bh w0 = (__m512bh)_mm512_permutexvar_epi16(even, table);
            __m512bh w1 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(even, 4), table);
            __m512bh w2 = (__m512bh)_mm512_permutexvar_epi16(odd, table);
            __m512bh w3 = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(odd, 4), table);
            for (int t = 0; t < tokens; t++) {
                const int32_t *inputs = (const int32_t *)(x + t * p->k + at) + pair;
                __m512bh x0 = (__m512bh)_mm512_set1_epi32(inputs[0]), x1 = (__m512bh)_mm512_set1_epi32(inputs[1]);
                a[t] = _mm512_dpbf16_ps(a[t], w0, x0);
                b[t] = _mm512_dpbf16_ps(b[t], w1, x0);
                c[t] = _mm512_dpbf16_ps(c[t], w2, x1);
                d[t] = _mm512_dpbf16_ps(d[t], w3, x1);
            }
        }
        const __m512 scale0 = wide512(absmax), scale1 = wide512(absmax + 16);
        for (int t = 0; t < tokens; t++) {
            low[t] = _mm512_fmadd_ps(_mm512_add_ps(a[t], c[t]), scale0, low[t]);
            high[t] = _mm512_fmadd_ps(_mm512_add_ps(b[t], d[t]), scale1, high[t]);
        }
    }
    for (int t = 0; t < tokens; t++) {
        uint16_t *y = p->y + (token + t) * p->n + first;
        _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(low[t]));
        _mm256_storeu_si256((__m256i *)(y + 16), (__m256i)_mm512_cvtneps_pbh(high[t]));
    }
}

AVX512 static void one512(const Product *p, int64_t first, int64_t token, const uint16_t *levels) {
    rows512(p, first, token, levels, 1);
}

AVX512 static void four512(const Product *p, int64_t first, int64_t token, const uint16_t *levels) {
    rows512(p, first, token, levels, TOKENS);
}

/* ---- AVX2: the same with float32 products ---- */

#define AVX2 __attribute__((target("avx2,fma")))

/* 8 float32 -> bfloat16, nearest even, in the low halves of 8 words. */
AVX2 static inline __m256i narrow(__m256 values) {
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    return _mm256_srli_epi32(bits, 16);
}

AVX2 static inline __m256 wide256(const uint16_t *values) {
    __m128i bits = _mm_loadu_si128((const __m128i *)values);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* sums += W x for 8 rows, whose weights for an even and an odd input lie side by side as bfloat16. */
AVX2 static inline __m256 add_pair(__m256 sums, __m256i weights, __m256 even, __m256 odd) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    sums = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)), even, sums);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(weights, upper)), odd, sums);
}

/* Unpacking leaves rows 0-3 and 8-11 in one register, 4-7 and 12-15 in the other. */
AVX2 static inline void in_order(__m256 *a, __m256 *b) {
    __m256 first = _mm256_permute2f128_ps(*a, *b, 0x20);
    *b = _mm256_permute2f128_ps(*a, *b, 0x31);
    *a = first;
}

AVX2 static void one256(const Product *p, int64_t first, int64_t token, const uint16_t *levels) {
    uint8_t lows[16], highs[16];
    for (int i = 0; i < 16; i++)
        lows[i] = (uint8_t)levels[i], highs[i] = (uint8_t)(levels[i] >> 8);
    const __m256i low_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lows));
    const __m256i high_table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)highs));
    const __m256i nibble = _mm256_set1_epi8(15);
    const uint8_t *codes = p->codes + first * (p->k / 2);
    const uint16_t *absmax = p->absmax + first;
    const uint16_t *x = p->x + token * p->k;
    __m256 totals[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t at = 0; at < p->k; at += BLOCK, codes += BLOCK / 2 * ROWS, absmax += p->n) {
        __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
        for (int pair = 0; pair < BLOCK / 2; pair++) {
            const uint8_t *here = codes + pair * ROWS;
            _mm_prefetch((const char *)(here + AHEAD), _MM_HINT_T0);
            const uint32_t inputs = ((const uint32_t *)(x + at))[pair];
            const __m256 even = _mm256_castsi256_ps(_mm256_set1_epi32((int)(inputs << 16)));
            const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32((int)(inputs & 0xFFFF0000)));
            const __m256i both = _mm256_loadu_si256((const __m256i *)here);
            for (int half = 0; half < 2; half++) {
                __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, nibble);
                __m256i low = _mm256_shuffle_epi8(low_table, index), high = _mm256_shuffle_epi8(high_table, index);
                sums[2 * half] = add_pair(sums[2 * half], _mm256_unpacklo_epi8(low, high), even, odd);
                sums[2 * half + 1] = add_pair(sums[2 * half + 1], _mm256_unpackhi_epi8(low, high), even, odd);
            }
        }
        in_order(&sums[0], &sums[1]);
        in_order(&sums[2], &sums[3]);
        for (int i = 0; i < 4; i++)
            totals[i] = _mm256_fmadd_ps(sums[i], wide256(absmax + 8 * i), totals[i]);
    }
    uint16_t *y = p->y + token * p->n + first;
    for (int i = 0; i < 4; i += 2) {
        __m256i packed = _mm256_packus_epi32(narrow(totals[i]), narrow(totals[i + 1]));
        packed = _mm256_permute4x64_epi64(packed, 0xD8);
        _mm256_storeu_si256((__m256i *)(y + 8 * i), packed);
    }
}

AVX2 static void four256(const Product *p, int64_t first, int64_t token, const uint16_t *levels) {
    for (int t = 0; t < TOKENS; t++) /* the codes of 32 rows stay in the cache */
        one256(p, first, token + t, levels);
}

/* ---- which of them, and the pool ---- */

static Rows one, four;

/* 0: none of the kernels runs on this CPU; 1: AVX2; 2: AVX-512. `most` is the best that may be used. */
int nf4_choose(int most) {
    __builtin_cpu_init();
    int has = 0;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        has = 1;
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bf16"))
        has = 2;
    has = has < most ? has : most;
    one = has == 2 ? one512 : has == 1 ? one256 : 0;
    four = has == 2 ? four512 : has == 1 ? four256 : 0;
    return has;
}

static void block(const void *argument, int index) {
    const Job *job = argument;
    const Product *p = job->products;
    int64_t first = index;
    for (; first >= p->n / ROWS; p++)
        first -= p->n / ROWS;
    int64_t token = 0;
    for (; token + TOKENS <= p->m; token += TOKENS)
        four(p, first * ROWS, token, job->levels);
    for (; token < p->m; token++)
        one(p, first * ROWS, token, job->levels);
}

/* All products, on up to `threads` threads. */
void nf4_products(const Product *products, int count, const uint16_t *levels, int threads) {
    Job job = {products, count, levels};
    int64_t blocks = 0;
    for (int i = 0; i < count; i++)
        blocks += products[i].n / ROWS;
    pool_run(block, &job, (int)blocks, threads);
}

#else

int nf4_choose(int most) { return (void)most, 0; }
void nf4_products(const void *products, int count, const uint16_t *levels, int threads) {
    (void)products, (void)count, (void)levels, (void)threads;
}

#endif
