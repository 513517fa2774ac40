/* A decoder layer's attention sublayer for one token, NF4 or bfloat16 matrices, in one go: the norm before it, queries,
 * keys and values, the token's place in the KV cache, attention, the output projection, the sum with what came in, the
 * norm after it, and the router if there is one. When that begins, nothing else needs `room`. What comes in may be what
 * a call gives that is still under way: its end is waited for.
 *
 * Numbers are rounded to bfloat16 where a model's own operations round them.
 */
#include "attention.h"
#include "norm.h"
#include "pool.h"
#include "routing.h"
#include "token_heads.h"

#include "simd_8.h"

#include <string.h>

typedef struct {
    Matrix matrix;        /* [n, k] */
    const uint16_t *bias; /* [n], or none */
    int64_t n;
} Rows;

typedef struct {
    const uint16_t *x, *before, *after; /* [hidden]: what comes in, and the weights of the norms */
    const Rows *output; /* the output projection, in `blocks` of rows */
    int64_t blocks, hidden;
    uint16_t *normed; /* [hidden]: x as the heads see it */
    uint16_t *sum, *y; /* [hidden]: x and what attention gives; and that, as what follows sees it */
    void *room; /* 4 * heads * width bytes */
    double epsilon;
    int64_t twice; /* of both norms */
    const Routing *router; /* of y, or none */
    Heads heads;
    Attention attention; /* of one row; the last key and value are the token's, which has none yet */
} Sublayer;

typedef struct {
    const Sublayer *sublayer;
    RowKernel kernel;
} Job;

/* 32 numbers of the sum. */
TARGET static void one_tile(const void *argument, int index) {
    const Job *job = argument;
    const Sublayer *s = job->sublayer;
    const int64_t at = (int64_t)index * WIDTH;
    const Rows *rows = s->output;
    const int64_t k = s->attention.shared * s->attention.group * s->attention.width;
    for (; index >= rows->n / WIDTH; rows++)
        index -= (int)(rows->n / WIDTH);
    float totals[WIDTH];
    row_tile(&job->kernel, &rows->matrix, k, index, s->room, totals);
    for (int i = 0; i < WIDTH; i += 8) {
        F v = ONCE_ROUNDED(LOAD(totals + i));
        if (rows->bias)
            v = ONCE_ROUNDED(ADD(v, FROM_BF16(rows->bias + index * WIDTH + i)));
        PUT_BF16(s->sum + at + i, ADD(FROM_BF16(s->x + at + i), v));
    }
}

/* Heads [shared, width], one after the other, to the last token's place. */
static void keep(const uint16_t *heads, const uint16_t *kept, int64_t head, int64_t token, const Attention *a) {
    for (int64_t i = 0; i < a->shared; i++)
        memcpy((uint16_t *)kept + i * head + (a->length - 1) * token, heads + i * a->width, 2 * (size_t)a->width);
}

void token_sublayer(const Sublayer *s, int threads) {
    const Attention *a = &s->attention;
    const int64_t queries = a->shared * a->group * a->width, shared = a->shared * a->width;
    const Job job = {s, row_kernel(s->heads.bits, s->heads.levels)};
    pool_wait();
    norm_row(s->x, s->before, s->normed, s->hidden, (float)s->epsilon, (int)s->twice);
    token_heads(&s->heads, threads);
    keep(a->x + queries, a->keys, a->key_head, a->key_token, a);
    keep(a->x + queries + shared, a->values, a->value_head, a->value_token, a);
    attention(a, threads);
    row_prepare(&job.kernel, a->y, queries, s->room);
    pool_run(one_tile, &job, (int)(s->hidden / WIDTH), threads);
    norm_row(s->sum, s->after, s->y, s->hidden, (float)s->epsilon, (int)s->twice);
    if (s->router)
        route(s->router, threads);
}
