/* What tokens' experts gave, weighted and added up: see `combine.c`. */
#ifndef OFFLOAD_COMBINE_H
#define OFFLOAD_COMBINE_H

#include <stdint.h>

typedef struct {
    const uint16_t *y;      /* [tokens, top_k, n], bfloat16; n is a multiple of 8 */
    const void *weights;    /* [tokens, top_k], float32, or bfloat16 */
    const uint16_t *before; /* [tokens, n]: what the sums are added to, or none */
    uint16_t *out;          /* [tokens, n] */
    int64_t tokens, top_k, n;
    int64_t rounds; /* weights are bfloat16, and products are rounded, too */
} Combination;

void combine(const Combination *c, int threads);

#endif
