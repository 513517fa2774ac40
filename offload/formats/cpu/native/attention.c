/* Attention of one new token, bfloat16: queries that share keys and values are taken together, and a long context in
 * parts, so that all threads have some.
 *
 * Each part of PART keys has its largest score, its sum of weights and its mixture of values; these are joined in order
 * (as in FlashAttention, arXiv:2205.14135). So the bits do not hang on the number of threads.
 */
#include "attention.h"

#include "exponential.h"
#include "level.h"
#include "pool.h"
#include "simd_8.h"

#include <string.h>

enum { PART = 256, QUERIES = 8, MOST_WIDTH = 256 };

#define MIXED 4
#include "attention_rows.h"
#undef MIXED
#include "simd_end.h"

#ifdef __x86_64__
#include "simd_avx512.h"
#define MIXED 8
#define PUT_SUMS(at, v) put_sums_avx512(at, v)

TARGET ALWAYS void put_sums_avx512(float *at, const F *v) {
    __m256 halves[8];
    UNROLL
    for (int i = 0; i < 8; i++)
        halves[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
    _mm256_storeu_ps(at, sums_of_avx2(halves));
}

#include "attention_rows.h"
#undef MIXED
#include "simd_end.h"
#endif

#include "simd_8.h"

typedef struct {
    void (*scores)(const uint16_t *keys, int64_t step, int count, const float *x, int64_t width, float *scores,
                   int queries);
    void (*mixture)(const uint16_t *values, int64_t step, int count, const float *weights, int64_t width, float *y,
                    int queries);
} Kernel;

static Kernel kernel_in_use(void) {
    return (Kernel){WIDEST(scores), WIDEST(mixture)};
}

static int64_t parts_of(const Attention *a) { return (a->length + PART - 1) / PART; }

/* For each 8 queries: their largest scores and sums [8] each, and their mixtures [8, width]. */
static int64_t room_of(const Attention *a) { return (a->group + QUERIES - 1) / QUERIES * QUERIES * (a->width + 2); }

/* What a mask adds to the score of a row's key. */
static float masked(const Attention *a, int64_t row, int64_t key) {
    if (!a->mask)
        return 0;
    if (a->mask_added)
        return from_bf16(((const uint16_t *)a->mask)[row * a->mask_row + key]);
    return ((const uint8_t *)a->mask)[row * a->mask_row + key] ? 0 : -__builtin_inff();
}

/* Scores [count, 8] of a row's keys -> weights in their place, and of each query the largest score and the sum. */
TARGET static void weigh(const Attention *a, int64_t row, int64_t from, int count, float *scores, float *largest_out,
                         float *sum_out) {
    const F least = SPREAD(-3e38f), scale = SPREAD((float)a->scale);
    F largest = least, sum = ZERO();
    for (int j = 0; j < count; j++) {
        const float added = masked(a, row, from + j);
        /* Of a key that is not seen nothing counts; of others what is no number stays none. */
        const F s = added <= -3e38f ? least : MAX(least, ADD(MUL(LOAD(scores + 8 * j), scale), SPREAD(added)));
        STORE(scores + 8 * j, s);
        largest = MAX(s, largest);
    }
    for (int j = 0; j < count; j++) {
        const F s = LOAD(scores + 8 * j), weight = UNLESS(s, least, exponential(SUB(s, largest)));
        STORE(scores + 8 * j, weight);
        sum = ADD(sum, weight);
    }
    STORE(largest_out, largest);
    STORE(sum_out, sum);
}

TARGET static void one_part(const void *argument, int index) {
    const Attention *a = argument;
    const Kernel kernel = kernel_in_use();
    const int64_t part = index % parts_of(a), head = index / parts_of(a) % a->shared;
    const int64_t row = index / parts_of(a) / a->shared, from = part * PART;
    const int count = a->length - from < PART ? (int)(a->length - from) : PART;
    const uint16_t *keys = a->keys + row * a->key_row + head * a->key_head + from * a->key_token;
    const uint16_t *values = a->values + row * a->value_row + head * a->value_head + from * a->value_token;
    float x[QUERIES * MOST_WIDTH], scores[PART * QUERIES], *out = a->room + index * room_of(a);
    for (int64_t first = 0; first < a->group; first += QUERIES, out += QUERIES * (a->width + 2)) {
        const int left = (int)(a->group - first), own = left < QUERIES ? left : QUERIES;
        const int queries = own <= 2 ? own : own <= 4 ? 4 : QUERIES;
        memset(x, 0, sizeof x);
        const uint16_t *at = a->x + ((row * a->shared + head) * a->group + first) * a->width;
        widen_numbers(at, BFLOAT16, own * (int)a->width, x);
        kernel.scores(keys, a->key_token, count, x, a->width, scores, queries);
        weigh(a, row, from, count, scores, out, out + QUERIES);
        kernel.mixture(values, a->value_token, count, scores, a->width, out + 2 * QUERIES, queries);
    }
}

/* A head's parts, joined in order. */
TARGET static void join(const void *argument, int index) {
    const Attention *a = argument;
    const int64_t parts = parts_of(a), room = room_of(a);
    for (int64_t query = 0; query < a->group; query++) {
        const float *first = a->room + index * parts * room + query / QUERIES * QUERIES * (a->width + 2);
        const int64_t lane = query % QUERIES;
        float largest = -3e38f, sum = 0, factors[8], y[MOST_WIDTH] = {0};
        const float sink = a->sinks ? from_bf16(a->sinks[index % a->shared * a->group + query]) : -3e38f;
        for (int64_t p = 0; p < parts; p++)
            largest = first[p * room + lane] > largest ? first[p * room + lane] : largest;
        if (a->sinks) {
            largest = sink > largest ? sink : largest;
            STORE(factors, exponential(SPREAD(sink - largest)));
            sum = factors[0];
        }
        for (int64_t p = 0; p < parts; p++) {
            const float *part = first + p * room, *mixture = part + 2 * QUERIES + lane * a->width;
            STORE(factors, exponential(SPREAD(part[lane] - largest)));
            sum += part[QUERIES + lane] * factors[0];
            for (int64_t d = 0; d < a->width; d++)
                y[d] += mixture[d] * factors[0];
        }
        for (int64_t d = 0; d < a->width; d++)
            y[d] = sum == 0 ? 0 : y[d] / sum; /* where no key is seen */
        narrow(y, BFLOAT16, a->y + (index * a->group + query) * a->width, (int)a->width);
    }
}

void attention(const Attention *a, int threads) {
    pool_run(one_part, a, (int)(a->rows * a->shared * parts_of(a)), threads);
    pool_run(join, a, (int)(a->rows * a->shared), a->length > PART ? threads : 1);
}
