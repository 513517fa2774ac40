/* One row of x with 32 rows of a matrix, NF4 or bfloat16, for what computes a token. */
#ifndef OFFLOAD_ONE_ROW_H
#define OFFLOAD_ONE_ROW_H

#include "nf4.h"
#include "plain.h"

typedef struct {
    const void *numbers;    /* NF4's codes [n, k / 2], in tiles, or bfloat16 [n, k] */
    const uint16_t *absmax; /* NF4's */
} Matrix;

typedef struct {
    int64_t bits; /* of NF4's levels; 0 for bfloat16 */
    const void *levels;
    Nf4Kernel nf4;
    PlainKernel plain;
} RowKernel;

RowKernel row_kernel(int64_t bits, const void *levels);

/* A row x [k], bfloat16, as the kernel wants it: at most 4 * k bytes. */
void row_prepare(const RowKernel *kernel, const uint16_t *x, int64_t k, void *out);

/* That row with a tile of 32 rows of W: 32 sums. k is a multiple of 32, of NF4 of 64. */
void row_tile(const RowKernel *kernel, const Matrix *w, int64_t k, int64_t tile, const void *row, float *sums);

#endif
