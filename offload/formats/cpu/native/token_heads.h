/* Queries, keys and values of one token: see `token_heads.c`. */
#ifndef OFFLOAD_TOKEN_HEADS_H
#define OFFLOAD_TOKEN_HEADS_H

#include "one_row.h"

typedef struct {
    Matrix matrix;                /* [n, k] */
    const uint16_t *bias, *norm; /* bias [n] and norm [normed], or none */
    uint16_t *y; /* [n] */
    int64_t n, rotated, normed; /* normed: a head's width; or as many as the norm is over, from y on */
} Projection;

typedef struct {
    const uint16_t *x; /* [k] */
    const Projection *projections;
    int64_t count, k, width; /* n is a multiple of width, width of 32 */
    const uint16_t *cosines, *sines; /* [width], or of a head's first half alone, which the second one shares */
    int64_t second;                  /* where those of the second half begin */
    const void *levels;
    void *room; /* 4 * k bytes */
    double epsilon;
    int64_t bits, twice, whole; /* bits: see `RowKernel`. whole: norms are over more than a head */
} Heads;

void token_heads(const Heads *heads, int threads);

#endif
