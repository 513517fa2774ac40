/* What experts do between their products. */
#ifndef OFFLOAD_ACTIVATION_H
#define OFFLOAD_ACTIVATION_H

#include "exponential.h"

#include "simd_8.h"

/* (up + plus) * gate * sigmoid(alpha * gate), the gate at most `limit`, up between `limit` and less than nothing by as
 * much. Where they are `interleaved` in one matrix, its even rows are the gate's and its odd ones up's; else the gate's
 * come first. */
typedef struct {
    double limit, alpha, plus;
    int64_t interleaved;
} Gate;

/* `count` numbers of each, a multiple of 8. */
TARGET static inline void gated(const float *gate, const float *up, int count, const Gate *how, float *out) {
    const F most = SPREAD((float)how->limit), least = SPREAD(-(float)how->limit);
    const F alpha = SPREAD(-(float)how->alpha), plus = SPREAD((float)how->plus);
    for (int i = 0; i < count; i += 8) {
        const F x = MIN(most, LOAD(gate + i)); /* what is no number stays none */
        const F y = MAX(least, MIN(most, LOAD(up + i)));
        const F below = ADD(SPREAD(1), exponential(MUL(alpha, x)));
        STORE(out + i, MUL(DIV(x, below), ADD(y, plus)));
    }
}

/* Numbers of an interleaved matrix's rows, half of them in each of two arrays of `count`: put in order, in place. */
static inline void apart(float *gate, float *up, int count) {
    float both[2 * 64];
    for (int i = 0; i < count; i++)
        both[i] = gate[i], both[count + i] = up[i];
    for (int i = 0; i < count; i++)
        gate[i] = both[2 * i], up[i] = both[2 * i + 1];
}

/* A bias, bfloat16, for each of `count` numbers; or none. */
static inline void add_bias(float *values, const uint16_t *bias, int count) {
    for (int i = 0; bias && i < count; i++)
        values[i] += from_bf16(bias[i]);
}

/* The rows of the first matrix in which `width` numbers of the gate and of up begin, from the inner number `at` on. */
static inline int64_t gate_row(const Gate *how, int64_t at) { return how->interleaved ? 2 * at : at; }

static inline int64_t up_row(const Gate *how, int64_t at, int64_t width, int64_t inner) {
    return how->interleaved ? 2 * at + width : inner + at;
}

/* What comes of `count` numbers of these rows, which it changes; with the first matrix's bias, or none. */
static inline void activate(float *gate, float *up, int64_t at, int count, int64_t inner, const uint16_t *bias,
                            const Gate *how, float *out) {
    add_bias(gate, bias ? bias + gate_row(how, at) : 0, count);
    add_bias(up, bias ? bias + up_row(how, at, count, inner) : 0, count);
    if (how->interleaved)
        apart(gate, up, count);
    gated(gate, up, count, how, out);
}

#include "simd_end.h"

#endif
