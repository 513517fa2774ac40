/* What one token's attention begins with, for NF4 or bfloat16 matrices in one go: queries, keys and values of all heads,
 * the norms over a head or over all where a model has such, and the rotation by the token's position.
 *
 * Numbers are rounded to bfloat16 where a model's own operations round them.
 */
#include "token_heads.h"

#include "norm.h"
#include "one_row.h"
#include "pool.h"
#include "simd_8.h"

typedef struct {
    const Heads *heads;
    RowKernel kernel;
} Job;

/* (x cos - x' sin, x' cos + x sin) of the halves of a head, in place. */
TARGET static void rotate(uint16_t *x, const Heads *h) {
    const int64_t half = h->width / 2;
    for (int64_t i = 0; i < half; i += 8) {
        const F a = FROM_BF16(x + i), b = FROM_BF16(x + half + i), minus = SUB(ZERO(), b);
        const F first = ONCE_ROUNDED(MUL(a, FROM_BF16(h->cosines + i)));
        const F second = ONCE_ROUNDED(MUL(b, FROM_BF16(h->cosines + h->second + i)));
        PUT_BF16(x + i, ADD(first, ONCE_ROUNDED(MUL(minus, FROM_BF16(h->sines + i)))));
        PUT_BF16(x + half + i, ADD(second, ONCE_ROUNDED(MUL(a, FROM_BF16(h->sines + h->second + i)))));
    }
}

TARGET static void one_head(const void *argument, int index) {
    const Job *job = argument;
    const Heads *h = job->heads;
    const Projection *p = h->projections;
    for (; index >= p->n / h->width; p++)
        index -= (int)(p->n / h->width);
    uint16_t *y = p->y + index * h->width;
    for (int64_t at = 0; at < h->width; at += WIDTH, y += WIDTH) {
        float sums[WIDTH];
        row_tile(&job->kernel, &p->matrix, h->k, (index * h->width + at) / WIDTH, h->room, sums);
        for (int i = 0; i < WIDTH; i += 8) {
            PUT_BF16(y + i, LOAD(sums + i));
            if (p->bias)
                PUT_BF16(y + i, ADD(FROM_BF16(y + i), FROM_BF16(p->bias + index * h->width + at + i)));
        }
    }
    y -= h->width;
    if (h->whole)
        return;
    if (p->norm)
        norm_row(y, p->norm, y, h->width, (float)h->epsilon, (int)h->twice);
    if (p->rotated)
        rotate(y, h);
}

/* What waits for all heads, where norms are over all of them. */
static void norm_all(const Heads *h) {
    for (const Projection *p = h->projections; p < h->projections + h->count; p++)
        if (p->norm)
            norm_row(p->y, p->norm, p->y, p->normed, (float)h->epsilon, (int)h->twice);
    for (const Projection *p = h->projections; p < h->projections + h->count; p++)
        for (int64_t at = 0; p->rotated && at < p->n; at += h->width)
            rotate(p->y + at, h);
}

void token_heads(const Heads *heads, int threads) {
    const Job job = {heads, row_kernel(heads->bits, heads->levels)};
    int64_t count = 0;
    row_prepare(&job.kernel, heads->x, heads->k, heads->room);
    for (int64_t i = 0; i < heads->count; i++)
        count += heads->projections[i].n / heads->width;
    pool_run(one_head, &job, (int)count, threads);
    if (heads->whole)
        norm_all(heads);
}
