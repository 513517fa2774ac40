/* Products with NF4 matrices, and what both ways to compute them share: see the beginning of `nf4.c`. */
#ifndef OFFLOAD_NF4_H
#define OFFLOAD_NF4_H

#include <stdint.h>

typedef struct {
    const uint8_t *codes;   /* [n, k / 2], in tiles */
    const uint16_t *absmax; /* [n / 32, k / 64, 32] */
    int64_t k;
} Nf4;

/* A block of inputs, the rows of a tile, and the rows of x that are taken at a time: totals, inputs and weights of a block
 * for ROWS of them stay in the first cache. */
enum { BLOCK = 64, WIDTH = 32, GROUP_ROWS = 4, ROWS = 48, AHEAD = 4096 /* bytes */, AHEAD_BLOCKS = 3 };

/* A block of a row of x: a scale times integers. */
typedef struct {
    int32_t pairs[BLOCK / 2]; /* 2 integers each */
    float scale;              /* of x and of the levels */
} Block16;

typedef struct {
    int32_t quads[BLOCK / 4];   /* 4 integers each */
    int32_t amounts[BLOCK / 4]; /* without their signs */
    float scale;                /* of x and of the levels */
    int32_t start;              /* what makes good that VNNI's weights are larger by 128 */
} Block8;

/* One way to compute. A row of x is its blocks, one after the other. */
typedef struct {
    int64_t block; /* bytes */
    void (*round)(const float *values, void *block);
    /* A tile with one row of x, or with up to ROWS of them: the sums [count, 32] are added to `totals`. */
    void (*one_row)(const Nf4 *w, int64_t tile, const void *row, const void *levels, float *totals);
    void (*many_rows)(const Nf4 *w, int64_t tile, const void *const *rows, int count, const void *levels,
                      float *totals);
} Nf4Kernel;

/* For the level in use, with levels that are integers of `bits`: 16, in 4096ths, or 8, in 127ths. */
Nf4Kernel nf4_kernel(int bits);
Nf4Kernel nf4_int16(void);
Nf4Kernel nf4_int8(void);

/* A row x [k], bfloat16, as blocks. */
void nf4_round_row(const uint16_t *x, int64_t k, const Nf4Kernel *kernel, char *out);

/* A tile with up to ROWS rows of x: sums [count, 32]. */
void nf4_tile(const Nf4Kernel *kernel, const Nf4 *w, int64_t tile, const void *const *rows, int count,
              const void *levels, float *sums);

#endif
