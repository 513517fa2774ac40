/* Rows of bfloat16 over the root of their mean square, times a weight, on x86 CPUs. */
#include "norm.h"

#include "pool.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include "vectors.h"

enum { ROWS_AT_ONCE = 16 };

typedef struct {
    const uint16_t *x, *weight; /* [rows, n], [n] */
    uint16_t *y;
    int64_t rows, n; /* n is a multiple of 8 */
    float epsilon;
    int twice; /* a number is rounded before it is weighted, too */
} Norm;

__attribute__((target("avx2,fma,f16c"))) void norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t n,
                                                      float epsilon, int twice) {
    __m256 sums[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t i = 0; i < n; i += 8) {
        const __m256 v = wide(x + i);
        sums[i / 8 % 4] = _mm256_fmadd_ps(v, v, sums[i / 8 % 4]);
    }
    float lanes[8], sum = 0;
    _mm256_storeu_ps(lanes, _mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    const __m256 mean = _mm256_set1_ps(sum / (float)n + epsilon);
    const __m256 factor = _mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(mean));
    for (int64_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_mul_ps(wide(x + i), factor);
        put_bf16(y + i, _mm256_mul_ps(twice ? once_rounded(v) : v, wide(weight + i)));
    }
}

static void some_rows(const void *argument, int index) {
    const Norm *job = argument;
    for (int64_t row = (int64_t)index * ROWS_AT_ONCE; row < job->rows && row < (int64_t)(index + 1) * ROWS_AT_ONCE; row++)
        norm_row(job->x + row * job->n, job->weight, job->y + row * job->n, job->n, job->epsilon, job->twice);
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
