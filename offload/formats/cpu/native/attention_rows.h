/* Template of `attention.c` for one level. */

/* Products of `count` keys with `queries` queries [queries, width]: scores [count, 8]. */
TARGET ALWAYS void NAME(score)(const uint16_t *keys, int64_t step, int count, const float *x, int64_t width,
                               float *scores, const int queries) {
    for (int j = 0; j < count; j++, keys += step, scores += QUERIES) {
        F sums[QUERIES];
        FETCH(keys + 8 * step);
        UNROLL
        for (int q = 0; q < QUERIES; q++)
            sums[q] = ZERO();
        for (int64_t d = 0; d < width; d += LANES) {
            const F key = FROM_BF16(keys + d);
            UNROLL
            for (int q = 0; q < queries; q++)
                sums[q] = FMA(key, LOAD(x + q * width + d), sums[q]);
        }
        PUT_SUMS(scores, sums);
    }
}

/* y [queries, width] = sums over `count` values, each times its weight [count, 8]. */
TARGET ALWAYS void NAME(mix)(const uint16_t *values, int64_t step, int count, const float *weights, int64_t width,
                             float *y, const int queries) {
    for (int64_t d = 0; d < width; d += 2 * LANES)
        for (int first = 0; first < queries; first += MIXED) {
            F sums[MIXED][2];
            UNROLL
            for (int q = 0; q < MIXED; q++)
                sums[q][0] = sums[q][1] = ZERO();
            const uint16_t *at = values + d;
            for (int j = 0; j < count; j++, at += step) {
                const F low = FROM_BF16(at), high = FROM_BF16(at + LANES);
                UNROLL
                for (int q = 0; q < MIXED && q < queries; q++) {
                    const F weight = SPREAD(weights[j * QUERIES + first + q]);
                    sums[q][0] = FMA(low, weight, sums[q][0]);
                    sums[q][1] = FMA(high, weight, sums[q][1]);
                }
            }
            UNROLL
            for (int q = 0; q < MIXED && q < queries; q++) {
                STORE(y + (first + q) * width + d, sums[q][0]);
                STORE(y + (first + q) * width + d + LANES, sums[q][1]);
            }
        }
}

#define FOR_QUERIES(function, ...)                                                                                     \
    switch (queries) {                                                                                                 \
    case 1: NAME(function)(__VA_ARGS__, 1); break;                                                                     \
    case 2: NAME(function)(__VA_ARGS__, 2); break;                                                                     \
    case 4: NAME(function)(__VA_ARGS__, 4); break;                                                                     \
    default: NAME(function)(__VA_ARGS__, 8);                                                                           \
    }

TARGET static void NAME(scores)(const uint16_t *keys, int64_t step, int count, const float *x, int64_t width,
                                float *scores, int queries) {
    FOR_QUERIES(score, keys, step, count, x, width, scores)
}

TARGET static void NAME(mixture)(const uint16_t *values, int64_t step, int count, const float *weights, int64_t width,
                                 float *y, int queries) {
    FOR_QUERIES(mix, values, step, count, weights, width, y)
}

#undef FOR_QUERIES
