#include "plain.h"

#include "level.h"
#include "numbers.h"
#include "pool.h"

/* A task is a tile of rows of W with all rows of x, some of them and some inputs at a time: x's part of a group stays in
 * the first cache, W's part of a tile and x's of all groups in the second. */
enum { TILE = PLAIN_TILE, COLUMNS = 2, FEW_COLUMNS = 4, GROUP_ROWS = 6, FEW_ROWS = 12, ROWS = PLAIN_ROWS };
enum { CHUNK = 1024, APART = PLAIN_APART };

#include "simd_8.h"
#include "plain_rows.h"
#include "simd_end.h"

#ifdef __x86_64__
#include "simd_avx512.h"
#include "plain_rows.h"
#include "simd_end.h"
#endif

typedef struct {
    const Plain *products;
    int x_kind, w_kind, shared;
    float *room;
    PlainKernel kernel;
} Job;

PlainKernel plain_kernel(int w_kind) {
    return (PlainKernel){WIDEST(tiles)[w_kind], WIDEST(widen), WIDEST(lanes), size_of(w_kind)};
}

void plain_tile(const PlainKernel *kernel, const float *x, int rows, const char *w, int64_t k, int count, float *sums) {
    /* Few rows read whole rows of W, one after the other; many read a part of all that stays in the first cache. */
    const int columns = rows > FEW_ROWS ? count : rows > 1 ? FEW_COLUMNS : COLUMNS;
    const int64_t part = rows > FEW_ROWS ? CHUNK : k;
    for (int c = 0; c < count; c += columns)
        for (int64_t i = 0; i < k; i += part)
            kernel->tile(x + i, k + APART, w + (c * k + i) * kernel->width, k * kernel->width, k - i < part ? k - i : part,
                         sums + c, i == 0, rows, count - c < columns ? count - c : columns);
}

static void put(const Job *job, const Plain *p, int64_t row, int64_t first, int count, float *sums) {
    const uint16_t *scales = job->w_kind == INT8 ? (const uint16_t *)p->scales + first : 0;
    for (int c = 0; scales && c < count; c++)
        sums[c] *= from_bf16(scales[c]);
    narrow(sums, job->x_kind, (char *)p->y + (row * p->n + first) * size_of(job->x_kind), count);
}

static void multiply(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = (job->products->n + TILE - 1) / TILE, first = index % tiles * TILE;
    const Plain *p = job->products + index / tiles;
    const int64_t step = p->k + APART;
    const int count = p->n - first < TILE ? (int)(p->n - first) : TILE;
    const float *x = job->room + (job->shared ? 0 : index / tiles * p->m * step);
    const char *w = (const char *)p->w + first * p->k * job->kernel.width;
    float sums[ROWS * TILE];
    for (int64_t row = 0; row < p->m; row += ROWS) {
        const int rows = p->m - row < ROWS ? (int)(p->m - row) : ROWS;
        plain_tile(&job->kernel, x + row * step, rows, w, p->k, count, sums);
        for (int r = 0; r < rows; r++)
            put(job, p, row + r, first, count, sums + r * TILE);
    }
}

static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const Plain *p = job->products;
    const int64_t blocks = (p->m + ROWS - 1) / ROWS, from = index % blocks * ROWS;
    const int64_t to = from + ROWS < p->m ? from + ROWS : p->m, x_step = p->k * size_of(job->x_kind);
    float *out = job->room + index / blocks * p->m * (p->k + APART);
    for (int64_t row = from; row < to; row++)
        job->kernel.widen((const char *)p[index / blocks].x + row * x_step, job->x_kind, job->w_kind,
                   out + row * (p->k + APART), p->k);
}

void plain_products(const Plain *products, int count, int shared, int x_kind, int w_kind, float *room, int threads) {
    const Job job = {products, x_kind, w_kind, shared, room, plain_kernel(w_kind)};
    const int64_t blocks = (products->m + ROWS - 1) / ROWS, tiles = (products->n + TILE - 1) / TILE;
    pool_run(prepare, &job, (int)(shared ? blocks : blocks * count), products->m > 1 ? threads : 1);
    pool_run(multiply, &job, (int)(tiles * count), threads);
}
