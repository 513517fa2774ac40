/* What experts do between their products. */
#ifndef OFFLOAD_ACTIVATION_H
#define OFFLOAD_ACTIVATION_H

#include "exponential.h"

/* (up + plus) * gate * sigmoid(alpha * gate), the gate at most `limit`, up between `limit` and less than nothing by as
 * much. Where they are `interleaved` in one matrix, its even rows are the gate's and its odd ones up's; else the gate's
 * come first. */
typedef struct {
    double limit, alpha, plus;
    int64_t interleaved;
} Gate;

/* `count` numbers of each, a multiple of 8. */
__attribute__((target("avx2,fma,f16c"))) static inline void gated(const float *gate, const float *up, int count,
                                                                  const Gate *how, float *out) {
    const __m256 most = _mm256_set1_ps((float)how->limit), least = _mm256_set1_ps(-(float)how->limit);
    const __m256 one = _mm256_set1_ps(1), plus = _mm256_set1_ps((float)how->plus);
    const __m256 alpha = _mm256_set1_ps(-(float)how->alpha);
    for (int i = 0; i < count; i += 8) {
        const __m256 x = _mm256_min_ps(most, _mm256_loadu_ps(gate + i)); /* what is no number stays none */
        const __m256 y = _mm256_max_ps(least, _mm256_min_ps(most, _mm256_loadu_ps(up + i)));
        const __m256 below = _mm256_add_ps(one, exponential(_mm256_mul_ps(alpha, x)));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(x, below), _mm256_add_ps(y, plus)));
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

#endif
