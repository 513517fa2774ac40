/* Attention of one new token: see `attention.c`. */
#ifndef OFFLOAD_ATTENTION_H
#define OFFLOAD_ATTENTION_H

#include <stdint.h>

typedef struct {
    const uint16_t *x;          /* queries [rows, shared * group, width] */
    const uint16_t *keys, *values; /* [rows, shared, length, width]; steps from a row, a head, a token to the next */
    int64_t key_row, key_head, key_token, value_row, value_head, value_token;
    const void *mask; /* [rows, length] bytes, what is 0 is not seen; or bfloat16 to be added; or none */
    int64_t mask_row, mask_added;
    const uint16_t *sinks; /* [shared * group]: a score of each query that goes to no value; or none */
    uint16_t *y; /* [rows, shared * group, width] */
    float *room; /* of each part of each head of each row: `room_of` */
    int64_t rows, shared, group, length, width;
    double scale;
} Attention;

void attention(const Attention *a, int threads);

#endif
