/* What a token's experts gave, weighted and added up: the bits of torch's product and sum over up to 16. */
#include "combine.h"

#include "pool.h"
#include "simd_8.h"

enum { TOKENS_AT_ONCE = 4 };

static float weight_of(const Combination *c, int64_t at) {
    return c->rounds ? from_bf16(((const uint16_t *)c->weights)[at]) : ((const float *)c->weights)[at];
}

TARGET static void some_tokens(const void *argument, int index) {
    const Combination *c = argument;
    const int64_t first = (int64_t)index * TOKENS_AT_ONCE, n = c->n;
    for (int64_t t = first; t < c->tokens && t < first + TOKENS_AT_ONCE; t++) {
        const uint16_t *y = c->y + t * c->top_k * n;
        for (int64_t i = 0; i < n; i += 8) {
            F sum = ZERO();
            for (int64_t k = 0; k < c->top_k; k++) {
                const F v = MUL(FROM_BF16(y + k * n + i), SPREAD(weight_of(c, t * c->top_k + k)));
                sum = ADD(sum, c->rounds ? ONCE_ROUNDED(v) : v);
            }
            if (c->before)
                sum = ADD(FROM_BF16(c->before + t * n + i), ONCE_ROUNDED(sum));
            PUT_BF16(c->out + t * n + i, sum);
        }
    }
}

void combine(const Combination *c, int threads) {
    const int64_t parts = (c->tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
    pool_run(some_tokens, c, (int)parts, threads);
}
