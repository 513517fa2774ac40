/* Products with NF4 matrices: y = x W^T, several matrices at once, in integers of 16 or of 8 bits.
 *
 * A matrix [n, k] lies as `offload.formats.cpu.nf4` packs it: tiles of 32 rows, in them for each pair of inputs 32
 * bytes, two for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones. `absmax` is
 * bfloat16 [n / 32, k / 64, 32]: a tile's scales lie in a row, too. x and y are bfloat16. n is a multiple of 32, k of 64.
 *
 * Sums of a block of 64 inputs are exact, and added up block by block: what a row of x gives has the same bits whatever
 * rows come with it, and on every processor.
 */
#include "nf4.h"

#include "numbers.h"
#include "pool.h"

#include <string.h>

Nf4Kernel nf4_kernel(int bits) { return bits == 8 ? nf4_int8() : nf4_int16(); }

typedef struct {
    const uint16_t *x; /* [m, k] */
    const uint8_t *codes;
    const uint16_t *absmax;
    uint16_t *y; /* [m, n], `step` numbers from a row to the next */
    int64_t m, n, k, step;
} Product;

typedef struct {
    const Product *products;
    const void *levels; /* the 16 levels, as integers */
    char *room;
    int shared; /* one x for all */
    Nf4Kernel kernel;
} Job;

TARGET_LEAST void nf4_round_row(const uint16_t *x, int64_t k, const Nf4Kernel *kernel, char *out) {
    float values[BLOCK];
    for (int64_t at = 0; at < k; at += BLOCK, out += kernel->block) {
        widen_numbers(x + at, BFLOAT16, BLOCK, values);
        kernel->round(values, out);
    }
}

void nf4_tile(const Nf4Kernel *kernel, const Nf4 *w, int64_t tile, const void *const *rows, int count,
              const void *levels, float *sums) {
    memset(sums, 0, (size_t)count * WIDTH * sizeof(float));
    if (count == 1)
        kernel->one_row(w, tile, rows[0], levels, sums);
    else
        kernel->many_rows(w, tile, rows, count, levels, sums);
}

static int64_t row_bytes(const Job *job) { return job->products->k / BLOCK * job->kernel.block; }

static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const int64_t m = job->products->m, k = job->products->k, parts = (m + ROWS - 1) / ROWS;
    const int64_t from = index % parts * ROWS, product = index / parts;
    for (int64_t row = from; row < m && row < from + ROWS; row++)
        nf4_round_row(job->products[product].x + row * k, k, &job->kernel, job->room + (product * m + row) * row_bytes(job));
}

static void multiply(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = job->products->n / WIDTH, tile = index % tiles, m = job->products->m;
    const Product *p = job->products + index / tiles;
    const char *x = job->room + (job->shared ? 0 : index / tiles * m * row_bytes(job));
    const Nf4 w = {p->codes, p->absmax, p->k};
    float totals[ROWS * WIDTH];
    for (int64_t row = 0; row < m; row += ROWS) {
        const int count = m - row < ROWS ? (int)(m - row) : ROWS;
        const void *rows[ROWS];
        for (int r = 0; r < count; r++)
            rows[r] = x + (row + r) * row_bytes(job);
        nf4_tile(&job->kernel, &w, tile, rows, count, job->levels, totals);
        for (int r = 0; r < count; r++)
            narrow(totals + r * WIDTH, BFLOAT16, p->y + (row + r) * p->step + tile * WIDTH, WIDTH);
    }
}

typedef struct {
    const uint16_t *x;
    int64_t k;
    char *out;
    Nf4Kernel kernel;
} Rounding;

static void round_one(const void *argument, int row) {
    const Rounding *job = argument;
    nf4_round_row(job->x + row * job->k, job->k, &job->kernel, job->out + row * (job->k / BLOCK * job->kernel.block));
}

/* x [rows, k] as blocks for levels that are integers of `bits`: at most 4 * rows * k bytes. */
void nf4_round(const uint16_t *x, int64_t rows, int64_t k, int bits, void *out, int threads) {
    const Rounding job = {x, k, out, nf4_kernel(bits)};
    pool_run(round_one, &job, (int)rows, threads);
}

/* All products, which are of one shape, on up to `threads` threads. The levels are integers of `bits`. `room` has
 * 4 * m * k bytes, which is plenty, for each different x: there is one, if `shared`. */
void nf4_products(const Product *products, int count, int shared, int bits, const void *levels, void *room,
                  int threads) {
    const Job job = {products, levels, room, shared, nf4_kernel(bits)};
    const int64_t parts = (products->m + ROWS - 1) / ROWS;
    pool_run(prepare, &job, (int)(shared ? parts : parts * count), products->m > 1 ? threads : 1);
    pool_run(multiply, &job, (int)(products->n / WIDTH * count), threads);
}
