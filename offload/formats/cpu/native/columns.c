#include "columns.h"

#include "level.h"
#include "numbers.h"
#include "pool.h"

#include <string.h>

/* A task is a tile of outputs, whose halves lie in the two halves of the nested format's bytes. Inputs and totals of so
 * many ROWS, and the weights of a block and a half of a tile, stay in the first cache. */
enum { BLOCK = 64, TILE = 64, WIDTH = 32, GROUP_ROWS = 6, ROWS = 8 * GROUP_ROWS, AHEAD = 2048 /* bytes */ };

typedef void (*Widen)(const Columns *p, int kind, int64_t at, int64_t first, int length, float *panel);
typedef void (*Multiply)(const float *panel, const float *x, int length, float *totals, int rows);

#include "simd_8.h"
#include "columns_rows.h"
#include "simd_end.h"

#ifdef __x86_64__
#include "simd_avx512.h"
#include "columns_rows.h"
#include "simd_end.h"
#endif

typedef struct {
    const Columns *products;
    int shared, x_kind, w_kind;
    float *room;
    Widen widen;
    Multiply multiply;
} Job;

static int64_t blocks_of(const Columns *p) { return (p->k + BLOCK - 1) / BLOCK; }

static int length_of(const Columns *p, int64_t at) { return p->k - at < BLOCK ? (int)(p->k - at) : BLOCK; }

/* x's rows as float32, block by block: [block, m, BLOCK]. */
static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const int64_t m = job->products->m, parts = (m + ROWS - 1) / ROWS, from = index % parts * ROWS;
    const Columns *p = job->products + index / parts;
    const int64_t size = size_of(job->x_kind);
    float *out = job->room + index / parts * m * blocks_of(p) * BLOCK;
    for (int64_t row = from; row < m && row < from + ROWS; row++)
        for (int64_t at = 0; at < p->k; at += BLOCK)
            widen_numbers((const char *)p->x + (row * p->k + at) * size, job->x_kind, length_of(p, at),
                          out + (at / BLOCK * m + row) * BLOCK);
}

static void tile(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = job->products->n / TILE, first = index % tiles * TILE;
    const Columns *p = job->products + index / tiles;
    const float *x = job->room + (job->shared ? 0 : index / tiles * p->m * blocks_of(p) * BLOCK);
    float totals[ROWS * TILE], panel[BLOCK * WIDTH];
    for (int64_t row = 0; row < p->m; row += ROWS) {
        const int rows = p->m - row < ROWS ? (int)(p->m - row) : ROWS;
        memset(totals, 0, (size_t)rows * TILE * sizeof(float));
        for (int64_t at = 0; at < p->k; at += BLOCK)
            for (int half = 0; half < TILE; half += WIDTH) {
                const int length = length_of(p, at);
                job->widen(p, job->w_kind, at, first + half, length, panel);
                job->multiply(panel, x + (at / BLOCK * p->m + row) * BLOCK, length, totals + half, rows);
            }
        for (int r = 0; r < rows; r++)
            narrow(totals + r * TILE, job->x_kind,
                   (char *)p->y + ((row + r) * p->n + first) * size_of(job->x_kind), TILE);
    }
}

void columns_products(const Columns *products, int count, int shared, int x_kind, int w_kind, float *room,
                      int threads) {
    const Job job = {products, shared, x_kind, w_kind, room, WIDEST(widen), WIDEST(multiply)};
    const int64_t parts = (products->m + ROWS - 1) / ROWS;
    pool_run(prepare, &job, (int)(shared ? parts : parts * count), products->m > 1 ? threads : 1);
    pool_run(tile, &job, (int)(products->n / TILE * count), threads);
}
