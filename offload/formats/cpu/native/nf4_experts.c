/* Experts of NF4 matrices in one go: two products and a gate between, each expert with the rows of x that go to it.
 *
 * Between the two products numbers stay float32, until they are rounded for the second one. So no token's result hangs
 * on others, nor on which experts come together.
 */
#include "activation.h"
#include "combine.h"
#include "nf4.h"
#include "pool.h"

typedef struct {
    const uint16_t *up_bias, *down_bias; /* [2 * inner] and [hidden], or none */
    const uint8_t *up_codes;             /* [2 * inner, hidden / 2]: the gate's rows and up's */
    const uint16_t *up_absmax;
    const uint8_t *down_codes; /* [hidden, inner / 2] */
    const uint16_t *down_absmax;
    const int64_t *order; /* [m]: rows of y; each row of x has `top_k` of them, one after the other */
    int64_t m, first;     /* rows, and how many the experts before have */
} Expert;

typedef struct {
    const Expert *experts;
    int64_t count, hidden, inner, top_k;
    const uint16_t *token; /* [hidden]: the only row of x, to be rounded; or none: x is what `nf4_round` made */
    char *x;
    uint16_t *y; /* [rows of x * top_k, hidden] */
    const void *levels;
    int64_t bits;
    char *between; /* room for what `nf4_round` would make of as many rows of `inner` as all experts have */
    const Combination *sum; /* of y, made at last; or none */
    Gate gate;
} Experts;

typedef struct {
    const Expert *experts;
    int64_t hidden, inner, top_k;
    const char *x; /* rounded */
    uint16_t *y;   /* [rows of x * top_k, hidden] */
    const void *levels;
    char *between; /* rounded, too: a row for each of all experts' m */
    Nf4Kernel kernel;
    Gate gate;
} Job;

static int64_t row_bytes(const Job *job, int64_t k) { return k / BLOCK * job->kernel.block; }

/* 64 of an expert's inner numbers, for all its rows, rounded. */
static void first_half(const void *argument, int index) {
    const Job *job = argument;
    const int64_t blocks = job->inner / BLOCK, block = index % blocks;
    const Expert *e = job->experts + index / blocks;
    const Nf4 w = {e->up_codes, e->up_absmax, job->hidden};
    float gate[ROWS * WIDTH], up[ROWS * WIDTH], values[ROWS * BLOCK];
    for (int64_t row = 0; row < e->m; row += ROWS) {
        const int count = e->m - row < ROWS ? (int)(e->m - row) : ROWS;
        const void *rows[ROWS];
        for (int r = 0; r < count; r++)
            rows[r] = job->x + e->order[row + r] / job->top_k * row_bytes(job, job->hidden);
        for (int half = 0; half < BLOCK / WIDTH; half++) {
            const int64_t at = block * BLOCK + half * WIDTH;
            nf4_tile(&job->kernel, &w, gate_row(&job->gate, at) / WIDTH, rows, count, job->levels, gate);
            nf4_tile(&job->kernel, &w, up_row(&job->gate, at, WIDTH, job->inner) / WIDTH, rows, count, job->levels, up);
            for (int r = 0; r < count; r++)
                activate(gate + r * WIDTH, up + r * WIDTH, at, WIDTH, job->inner, e->up_bias, &job->gate,
                         values + r * BLOCK + half * WIDTH);
        }
        for (int r = 0; r < count; r++)
            job->kernel.round(values + r * BLOCK, job->between + (e->first + row + r) * row_bytes(job, job->inner) +
                                                      block * job->kernel.block);
    }
}

static void second_half(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = job->hidden / WIDTH, at = index % tiles;
    const Expert *e = job->experts + index / tiles;
    const Nf4 w = {e->down_codes, e->down_absmax, job->inner};
    float totals[ROWS * WIDTH];
    for (int64_t row = 0; row < e->m; row += ROWS) {
        const int count = e->m - row < ROWS ? (int)(e->m - row) : ROWS;
        const void *rows[ROWS];
        for (int r = 0; r < count; r++)
            rows[r] = job->between + (e->first + row + r) * row_bytes(job, job->inner);
        nf4_tile(&job->kernel, &w, at, rows, count, job->levels, totals);
        for (int r = 0; r < count; r++) {
            add_bias(totals + r * WIDTH, e->down_bias ? e->down_bias + at * WIDTH : 0, WIDTH);
            narrow(totals + r * WIDTH, BFLOAT16, job->y + e->order[row + r] * job->hidden + at * WIDTH, WIDTH);
        }
    }
}

void nf4_experts(const void *told, int threads) {
    const Experts *all = told;
    const Job job = {all->experts, all->hidden, all->inner, all->top_k, all->x, all->y, all->levels, all->between,
                     nf4_kernel((int)all->bits), all->gate};
    if (all->token)
        nf4_round_row(all->token, all->hidden, &job.kernel, all->x);
    pool_run(first_half, &job, (int)(all->inner / BLOCK * all->count), threads);
    pool_run(second_half, &job, (int)(all->hidden / WIDTH * all->count), threads);
    if (all->sum)
        combine(all->sum, threads);
}
