#include "one_row.h"

#include "numbers.h"

RowKernel row_kernel(int64_t bits, const void *levels) {
    RowKernel kernel = {.bits = bits, .levels = levels};
    if (bits)
        kernel.nf4 = nf4_kernel((int)bits);
    else
        kernel.plain = plain_kernel(BFLOAT16);
    return kernel;
}

void row_prepare(const RowKernel *kernel, const uint16_t *x, int64_t k, void *out) {
    if (kernel->bits)
        nf4_round_row(x, k, &kernel->nf4, out);
    else
        kernel->plain.widen((const char *)x, BFLOAT16, BFLOAT16, out, k);
}

void row_tile(const RowKernel *kernel, const Matrix *w, int64_t k, int64_t tile, const void *row, float *sums) {
    if (kernel->bits) {
        const Nf4 packed = {w->numbers, w->absmax, k};
        nf4_tile(&kernel->nf4, &packed, tile, &row, 1, kernel->levels, sums);
    } else
        plain_tile(&kernel->plain, row, 1, (const char *)((const uint16_t *)w->numbers + tile * PLAIN_TILE * k), k,
                   PLAIN_TILE, sums);
}
