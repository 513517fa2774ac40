/* One token's router: see `routing.c`. */
#ifndef OFFLOAD_ROUTING_H
#define OFFLOAD_ROUTING_H

#include <stdint.h>

typedef struct {
    const void *x, *weight; /* [k], [experts, k], bfloat16 */
    const uint16_t *bias;   /* [experts], or none */
    uint16_t *scores;       /* [experts] */
    int64_t *chosen;        /* [top_k] */
    float *weights;         /* [top_k] */
    uint16_t *rounded;      /* the same as bfloat16, to which weights are rounded then; or none */
    float *room;            /* 2 * k + 16, and twice as many as there are experts and 8 more */
    int64_t experts, k, top_k;
    int64_t of_chosen; /* weights are the softmax of the chosen ones' scores, not of all */
    int64_t scaled;    /* their sum is made one */
} Routing;

void route(const Routing *r, int threads);

#endif
