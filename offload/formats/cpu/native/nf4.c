/* Products with NF4 matrices on x86 CPUs: y = x W^T, several matrices at once, in integers of 16 or of 8 bits.
 *
 * A matrix [n, k] lies as `offload.formats.cpu.nf4` packs it: tiles of 32 rows, in them for each pair of inputs 32
 * bytes, two for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones. `absmax` is
 * bfloat16 [k / 64, n]. x and y are bfloat16. n is a multiple of 32, k of 64.
 *
 * Sums of a block of 64 inputs are exact, and added up block by block: what a row of x gives has the same bits whatever
 * rows come with it, and on every processor.
 */
#include "nf4.h"

#include "pool.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include "numbers.h"

typedef struct {
    const Nf4 *products;
    const void *levels; /* the 16 levels, as integers */
    char *room;
    int shared; /* one x for all */
    Nf4Kernel kernel;
} Job;

static int64_t bytes_of(const Job *job, const Nf4 *p) { return p->k / BLOCK * p->m * job->kernel.block; }

static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const int64_t m = job->products->m, parts = (m + ROWS - 1) / ROWS, from = index % parts * ROWS;
    const Nf4 *p = job->products + index / parts;
    char *out = job->room + index / parts * bytes_of(job, p);
    for (int64_t row = from; row < m && row < from + ROWS; row++)
        for (int64_t block = 0; block < p->k / BLOCK; block++)
            job->kernel.round(p->x + row * p->k + block * BLOCK, out + (block * m + row) * job->kernel.block);
}

static void multiply(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = job->products->n / WIDTH, tile = index % tiles;
    const Nf4 *p = job->products + index / tiles;
    const char *x = job->room + (job->shared ? 0 : index / tiles * bytes_of(job, p));
    float totals[ROWS * WIDTH];
    for (int64_t row = 0; row < p->m; row += ROWS) {
        const int rows = p->m - row < ROWS ? (int)(p->m - row) : ROWS;
        memset(totals, 0, (size_t)rows * WIDTH * sizeof(float));
        if (p->m == 1)
            job->kernel.one_row(p, tile, x, job->levels, totals);
        else
            job->kernel.many_rows(p, tile, x + row * job->kernel.block, rows, job->levels, totals);
        for (int r = 0; r < rows; r++)
            narrow(totals + r * WIDTH, BFLOAT16, p->y + (row + r) * p->n + tile * WIDTH, WIDTH);
    }
}

/* All products, which are of one shape, on up to `threads` threads. The levels are integers of `bits`: 16, in
 * 4096ths, or 8, in 127ths. `room` has 4 * m * k bytes, which is plenty, for each different x: there is one, if
 * `shared`. */
void nf4_products(const Nf4 *products, int count, int shared, int bits, const void *levels, void *room, int threads) {
    const Job job = {products, levels, room, shared, bits == 8 ? nf4_int8() : nf4_int16()};
    const int64_t parts = (products->m + ROWS - 1) / ROWS;
    pool_run(prepare, &job, (int)(shared ? parts : parts * count), products->m > 1 ? threads : 1);
    pool_run(multiply, &job, (int)(products->n / WIDTH * count), threads);
}

#else

void nf4_products(const Nf4 *products, int count, int shared, int bits, const void *levels, void *room, int threads) {
    (void)products, (void)count, (void)shared, (void)bits, (void)levels, (void)room, (void)threads;
}

#endif
