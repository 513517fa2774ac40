/* One token's router: a score for each expert, and which of them have the highest, with their weights.
 *
 * Scores are those of `plain.c` and a bias, rounded to bfloat16; of equal ones the first expert's is the higher.
 */
#include "routing.h"

#include "exponential.h"
#include "plain.h"
#include "simd_8.h"

/* e to `scores` [count], a multiple of 8, less `largest`. Returns their sum, eight sums side by side. */
TARGET static float exponentials(const float *scores, int64_t count, float largest, float *out) {
    float lanes[8], sum = 0;
    F sums = ZERO();
    for (int64_t i = 0; i < count; i += 8) {
        const F v = LOAD(scores + i), none = SPREAD(-__builtin_inff());
        const F e = UNLESS(v, none, exponential(SUB(v, SPREAD(largest))));
        STORE(out + i, e);
        sums = ADD(sums, e);
    }
    STORE(lanes, sums);
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    return sum;
}

/* The expert of the highest score among those not `taken`; what is no number is the highest. */
static int64_t highest(const float *scores, int64_t count, const int64_t *taken, int64_t so_many) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; e++) {
        if (best >= 0 && !(scores[e] > scores[best]) && !(scores[e] != scores[e] && scores[best] == scores[best]))
            continue;
        int64_t i = 0;
        while (i < so_many && taken[i] != e)
            i++;
        best = i == so_many ? e : best;
    }
    return best;
}

void route(const Routing *r, int threads) {
    const int64_t whole = (r->experts + 7) / 8 * 8;
    float *x = r->room, *scores = x + 2 * r->k + 16, *values = scores + whole;
    const Plain product = {x, r->weight, 0, scores, 1, r->experts, r->k};
    widen_numbers(r->x, BFLOAT16, (int)r->k, x);
    plain_products(&product, 1, 1, FLOAT32, BFLOAT16, x + r->k, threads);
    for (int64_t e = 0; e < r->experts; e++) {
        r->scores[e] = to_bf16(r->bias ? scores[e] + from_bf16(r->bias[e]) : scores[e]);
        scores[e] = from_bf16(r->scores[e]);
    }
    for (int64_t e = r->experts; e < whole; e++)
        scores[e] = -__builtin_inff();
    for (int64_t i = 0; i < r->top_k; i++)
        r->chosen[i] = highest(scores, r->experts, r->chosen, i);
    const float largest = scores[r->chosen[0]];
    float all = exponentials(scores, whole, largest, values), sum = 0;
    for (int64_t i = 0; i < r->top_k; i++)
        sum += r->weights[i] = values[r->chosen[i]];
    for (int64_t i = 0; i < r->top_k; i++)
        r->weights[i] /= r->of_chosen ? sum : all;
    if (r->scaled) {
        sum = 0;
        for (int64_t i = 0; i < r->top_k; i++)
            sum += r->weights[i];
        for (int64_t i = 0; i < r->top_k; i++)
            r->weights[i] /= sum;
    }
    for (int64_t i = 0; r->rounded && i < r->top_k; i++)
        r->weights[i] = from_bf16(r->rounded[i] = to_bf16(r->weights[i]));
}
