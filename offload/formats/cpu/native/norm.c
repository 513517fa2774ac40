/* Rows of bfloat16 over the root of their mean square, times a weight. */
#include "norm.h"

#include "pool.h"
#include "simd_8.h"

enum { ROWS_AT_ONCE = 16 };

typedef struct {
    const uint16_t *x, *weight; /* [rows, n], [n] */
    uint16_t *y;
    int64_t rows, n; /* n is a multiple of 8 */
    float epsilon;
    int twice; /* a number is rounded before it is weighted, too */
} Norm;

TARGET void norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t n, float epsilon, int twice) {
    F sums[4] = {ZERO(), ZERO(), ZERO(), ZERO()};
    for (int64_t i = 0; i < n; i += 8) {
        const F v = FROM_BF16(x + i);
        sums[i / 8 % 4] = FMA(v, v, sums[i / 8 % 4]);
    }
    float lanes[8], sum = 0;
    STORE(lanes, ADD(ADD(sums[0], sums[1]), ADD(sums[2], sums[3])));
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    const F mean = SPREAD(sum / (float)n + epsilon);
    const F factor = DIV(SPREAD(1), SQRT(mean));
    for (int64_t i = 0; i < n; i += 8) {
        const F v = MUL(FROM_BF16(x + i), factor);
        PUT_BF16(y + i, MUL(twice ? ONCE_ROUNDED(v) : v, FROM_BF16(weight + i)));
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
