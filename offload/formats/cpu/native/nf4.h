/* A product with an NF4 matrix, and what both ways to compute it share: see the beginning of `nf4.c`. */
#ifndef OFFLOAD_NF4_H
#define OFFLOAD_NF4_H

#include <stdint.h>

typedef struct {
    const uint16_t *x;      /* [m, k] */
    const uint8_t *codes;   /* [n, k / 2] */
    const uint16_t *absmax; /* [k / 64, n] */
    uint16_t *y;            /* [m, n] */
    int64_t m, n, k;
} Nf4;

/* A block of inputs, the rows of a tile, and the rows of x that are taken at a time: totals, inputs and weights of a block
 * for ROWS of them stay in the first cache. */
enum { BLOCK = 64, WIDTH = 32, GROUP_ROWS = 6, ROWS = 8 * GROUP_ROWS, AHEAD = 4096 /* bytes */ };

#if defined(__x86_64__) && defined(__GNUC__)
#include "numbers.h"

/* Unpacking with AVX2 leaves rows 0-3 and 8-11 in one vector, 4-7 and 12-15 in the next. */
__attribute__((target("avx2"))) ALWAYS void ordered_avx2(__m256 *v, int vectors) {
    for (int i = 0; i < vectors; i += 2) {
        const __m256 first = _mm256_permute2f128_ps(v[i], v[i + 1], 0x20);
        v[i + 1] = _mm256_permute2f128_ps(v[i], v[i + 1], 0x31);
        v[i] = first;
    }
}
#endif

#endif
