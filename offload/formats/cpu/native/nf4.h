/* A product with an NF4 matrix: see the beginning of `nf4.c`. */
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

#endif
