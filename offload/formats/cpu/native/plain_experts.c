/* Experts of bfloat16 matrices in one go: two products with a gate between them, each expert with the rows of x that go
 * to it.
 *
 * Between the two products numbers stay float32. So no token's result hangs on others, nor on which experts come
 * together.
 */
#include "activation.h"
#include "combine.h"
#include "plain.h"
#include "pool.h"

typedef struct {
    const uint16_t *up_bias, *down_bias; /* [2 * inner] and [hidden], or none */
    const uint16_t *up, *down;           /* [2 * inner, hidden], the gate's rows and up's, and [hidden, inner] */
    const int64_t *order; /* [m]: rows of y; each row of x has `top_k` of them, one after the other */
    int64_t m, first;     /* rows, and how many the experts before have */
} Expert;

typedef struct {
    const Expert *experts;
    int64_t count, hidden, inner, top_k; /* hidden and inner are multiples of PLAIN_TILE */
    const uint16_t *x;
    uint16_t *y; /* [rows of x * top_k, hidden] */
    float *rows, *between; /* room for all experts' m rows of hidden + PLAIN_APART and of inner + PLAIN_APART */
    const Combination *sum; /* of y, made at last; or none */
    Gate gate;
} Experts;

typedef struct {
    const Experts *all;
    PlainKernel kernel;
} Job;

/* One expert's rows of x as float32. */
static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const Experts *all = job->all;
    const Expert *e = all->experts + index;
    for (int64_t r = 0; r < e->m; r++)
        job->kernel.widen((const char *)(all->x + e->order[r] / all->top_k * all->hidden), BFLOAT16, BFLOAT16,
                          all->rows + (e->first + r) * (all->hidden + PLAIN_APART), all->hidden);
}

/* 32 of an expert's inner numbers, for all its rows, in the order of `widen`. */
static void first_half(const void *argument, int index) {
    const Job *job = argument;
    const Experts *all = job->all;
    const int64_t tiles = all->inner / PLAIN_TILE, at = index % tiles * PLAIN_TILE, lanes = job->kernel.lanes;
    const Expert *e = all->experts + index / tiles;
    const char *gates = (const char *)(e->up + gate_row(&all->gate, at) * all->hidden);
    const char *ups = (const char *)(e->up + up_row(&all->gate, at, PLAIN_TILE, all->inner) * all->hidden);
    float gate[PLAIN_ROWS * PLAIN_TILE], up[PLAIN_ROWS * PLAIN_TILE];
    for (int64_t row = e->first; row < e->first + e->m; row += PLAIN_ROWS) {
        const int64_t left = e->first + e->m - row;
        const int count = left < PLAIN_ROWS ? (int)left : PLAIN_ROWS;
        const float *x = all->rows + row * (all->hidden + PLAIN_APART);
        plain_tile(&job->kernel, x, count, gates, all->hidden, PLAIN_TILE, gate);
        plain_tile(&job->kernel, x, count, ups, all->hidden, PLAIN_TILE, up);
        for (int r = 0; r < count; r++) {
            float values[PLAIN_TILE], *out = all->between + (row + r) * (all->inner + PLAIN_APART) + at;
            activate(gate + r * PLAIN_TILE, up + r * PLAIN_TILE, at, PLAIN_TILE, all->inner, e->up_bias, &all->gate,
                     values);
            for (int64_t j = 0; j < PLAIN_TILE; j++)
                out[j / (2 * lanes) * 2 * lanes + j % 2 * lanes + j % (2 * lanes) / 2] = values[j];
        }
    }
}

static void second_half(const void *argument, int index) {
    const Job *job = argument;
    const Experts *all = job->all;
    const int64_t tiles = all->hidden / PLAIN_TILE, at = index % tiles * PLAIN_TILE;
    const Expert *e = all->experts + index / tiles;
    float sums[PLAIN_ROWS * PLAIN_TILE];
    for (int64_t row = 0; row < e->m; row += PLAIN_ROWS) {
        const int count = e->m - row < PLAIN_ROWS ? (int)(e->m - row) : PLAIN_ROWS;
        plain_tile(&job->kernel, all->between + (e->first + row) * (all->inner + PLAIN_APART), count,
                   (const char *)(e->down + at * all->inner), all->inner, PLAIN_TILE, sums);
        for (int r = 0; r < count; r++) {
            add_bias(sums + r * PLAIN_TILE, e->down_bias ? e->down_bias + at : 0, PLAIN_TILE);
            narrow(sums + r * PLAIN_TILE, BFLOAT16, all->y + e->order[row + r] * all->hidden + at, PLAIN_TILE);
        }
    }
}

void plain_experts(const void *told, int threads) {
    const Experts *all = told;
    const Job job = {all, plain_kernel(BFLOAT16)};
    pool_run(prepare, &job, (int)all->count, all->experts->m > 1 || all->count > 8 ? threads : 1);
    pool_run(first_half, &job, (int)(all->inner / PLAIN_TILE * all->count), threads);
    pool_run(second_half, &job, (int)(all->hidden / PLAIN_TILE * all->count), threads);
    if (all->sum)
        combine(all->sum, threads);
}
