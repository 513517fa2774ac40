/* Rows of bfloat16 over the root of their mean square, times a weight, on x86 CPUs. */
#include "pool.h"

#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include "numbers.h"

enum { ROWS_AT_ONCE = 16 };

typedef struct {
    const uint16_t *x, *weight; /* [rows, n], [n] */
    uint16_t *y;
    int64_t rows, n; /* n is a multiple of 8 */
    float epsilon;
    int twice; /* a number is rounded before it is weighted, too */
} Norm;

__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256 wide(const uint16_t *at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16));
}

/* To the nearest bfloat16, even where two are as near; what is no number stays none. */
__attribute__((target("avx2,fma,f16c"))) ALWAYS __m256i rounded(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7FC0), none);
}

__attribute__((target("avx2,fma,f16c"))) static void one_row(const Norm *job, int64_t row) {
    const uint16_t *x = job->x + row * job->n;
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < job->n; i += 8) {
        const __m256 v = wide(x + i);
        sums[i / 8 % 4] = _mm256_fmadd_ps(v, v, sums[i / 8 % 4]);
    }
    float lanes[8], sum = 0;
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    const __m256 mean = _mm256_set1_ps(sum / (float)job->n + job->epsilon);
    const __m256 factor = _mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(mean));
    for (int64_t i = 0; i < job->n; i += 8) {
        __m256 v = _mm256_mul_ps(wide(x + i), factor);
        if (job->twice)
            v = _mm256_castsi256_ps(_mm256_slli_epi32(rounded(v), 16));
        const __m256i bits = rounded(_mm256_mul_ps(v, wide(job->weight + i)));
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
        _mm_storeu_si128((__m128i *)(job->y + row * job->n + i), _mm256_castsi256_si128(words));
    }
}

static void some_rows(const void *argument, int index) {
    const Norm *job = argument;
    for (int64_t row = (int64_t)index * ROWS_AT_ONCE; row < job->rows && row < (int64_t)(index + 1) * ROWS_AT_ONCE; row++)
        one_row(job, row);
}

void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t n, float epsilon, int twice,
              int threads) {
    const Norm job = {x, weight, y, rows, n, epsilon, twice};
    const int64_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    pool_run(some_rows, &job, (int)parts, rows * n > 1 << 17 ? threads : 1);
}

#else

void rms_norm(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t rows, int64_t n, float epsilon, int twice,
              int threads) {
    (void)x, (void)weight, (void)y, (void)rows, (void)n, (void)epsilon, (void)twice, (void)threads;
}

#endif
