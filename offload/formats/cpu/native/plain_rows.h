/* Template of `plain.c` for one width of vectors: see simd_avx2.h.
 *
 * Two vectors of W at a time: of bfloat16 the numbers at even places and those at odd ones, as that takes no shuffle. x
 * lies in the same order.
 */

enum { NAME(lanes) = LANES };

#if LANES == 8
enum { NAME(MOST_COLUMNS) = 2, NAME(MID_COLUMNS) = 4, NAME(FEW_COLUMNS) = 2 };
#else
enum { NAME(MOST_COLUMNS) = 2, NAME(MID_COLUMNS) = 8, NAME(FEW_COLUMNS) = 4 };
#endif

TARGET ALWAYS F NAME(weights)(const char *at, const int kind, const int second) {
    if (kind == BFLOAT16)
        return second ? BF16_ODD(at) : BF16_EVEN(at);
    if (kind == FLOAT16)
        return FROM_FP16(at + second * 2 * LANES);
    return FROM_INT8(at + second * LANES);
}

/* The sum of the lanes, always in the same order. */
TARGET ALWAYS float NAME(sum)(F v) {
    float lanes[LANES];
    STORE(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            lanes[i] += lanes[i + width];
    return lanes[0];
}

/* sums[r, c] (+)= x[r] . w[c] over `length` inputs, of which CHUNK at a time are added up. */
TARGET ALWAYS void NAME(dots)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                              float *sums, const int first, const int kind, const int ahead, const int rows,
                              const int columns) {
    const int64_t width = kind == INT8 ? 1 : 2;
    /* What comes next is asked for as it lies in memory, one row after the other. */
    const int64_t part = columns * 2 * LANES * width;
    const char *next = w + columns * w_step, *end = next + length * width;
    for (int64_t from = 0; from < length; from += CHUNK) {
        const int64_t to = length - from < CHUNK ? length : from + CHUNK;
        F acc[GROUP_ROWS][8];
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int c = 0; c < columns; c++)
                acc[r][c] = ZERO();
        for (int64_t i = from; i < to; i += 2 * LANES) {
            if (ahead) {
                UNROLL
                for (int64_t at = 0; at < part; at += 64)
                    if (rows == 1)
                        FETCH_ONCE(next + at);
                    else
                        FETCH(next + at);
                next += part;
                if (next >= end)
                    next += w_step - length * width, end += w_step;
            }
            UNROLL
            for (int second = 0; second < 2; second++) {
                F weights[8];
                UNROLL
                for (int c = 0; c < columns; c++)
                    weights[c] = NAME(weights)(w + c * w_step + i * width, kind, second);
                UNROLL
                for (int r = 0; r < rows; r++) {
                    const F inputs = LOAD(x + r * x_step + i + second * LANES);
                    UNROLL
                    for (int c = 0; c < columns; c++)
                        acc[r][c] = FMA(weights[c], inputs, acc[r][c]);
                }
            }
        }
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int c = 0; c < columns; c++) {
                const float sum = NAME(sum)(acc[r][c]);
                sums[r * TILE + c] = first && !from ? sum : sums[r * TILE + c] + sum;
            }
    }
}

/* `rows` rows of x with `count` rows of W. */
TARGET ALWAYS void NAME(group)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                               float *sums, int first, const int kind, int ahead, const int rows, int count) {
    const int columns = rows == 1   ? NAME(MOST_COLUMNS)
                        : rows <= 3 ? NAME(MID_COLUMNS)
                                    : NAME(FEW_COLUMNS);
    int c = 0;
    for (; c + columns <= count; c += columns)
        NAME(dots)(x, x_step, w + c * w_step, w_step, length, sums + c, first, kind, ahead, rows, columns);
    for (; c < count; c++)
        NAME(dots)(x, x_step, w + c * w_step, w_step, length, sums + c, first, kind, ahead, rows, 1);
}

TARGET ALWAYS void NAME(tile)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                              float *sums, int first, const int kind, int rows, int count) {
    int ahead = 1; /* the first rows find W in memory, the others in the cache */
    for (; rows >= GROUP_ROWS; rows -= GROUP_ROWS, x += GROUP_ROWS * x_step, sums += GROUP_ROWS * TILE, ahead = 0)
        NAME(group)(x, x_step, w, w_step, length, sums, first, kind, ahead, GROUP_ROWS, count);
#define REST(n)                                                                                                        \
    case n:                                                                                                            \
        NAME(group)(x, x_step, w, w_step, length, sums, first, kind, ahead, n, count);                                        \
        break;
    switch (rows) { REST(1) REST(2) REST(3) REST(4) REST(5) }
#undef REST
}

TARGET static void NAME(tile_bf16)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                                   float *sums, int first, int rows, int count) {
    NAME(tile)(x, x_step, w, w_step, length, sums, first, BFLOAT16, rows, count);
}

TARGET static void NAME(tile_fp16)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                                   float *sums, int first, int rows, int count) {
    NAME(tile)(x, x_step, w, w_step, length, sums, first, FLOAT16, rows, count);
}

TARGET static void NAME(tile_int8)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length,
                                   float *sums, int first, int rows, int count) {
    NAME(tile)(x, x_step, w, w_step, length, sums, first, INT8, rows, count);
}

static const Tile NAME(tiles)[] = {0, NAME(tile_bf16), NAME(tile_fp16), NAME(tile_int8)};

/* A row of x as float32; for a bfloat16 matrix in the order that `weights` gives. */
TARGET static void NAME(widen)(const char *x, int x_kind, int w_kind, float *out, int64_t k) {
    const int64_t size = x_kind == FLOAT32 ? 4 : 2;
    for (int64_t i = 0; i < k; i += 2 * LANES, x += 2 * LANES * size, out += 2 * LANES) {
        if (x_kind == BFLOAT16 && w_kind == BFLOAT16) {
            STORE(out, BF16_EVEN(x));
            STORE(out + LANES, BF16_ODD(x));
            continue;
        }
        float numbers[2 * LANES];
        for (int half = 0; half < 2; half++) {
            const char *at = x + half * LANES * size;
            STORE(numbers + half * LANES, x_kind == FLOAT32    ? LOAD((const float *)at)
                                          : x_kind == BFLOAT16 ? FROM_BF16(at)
                                                               : FROM_FP16(at));
        }
        for (int j = 0; j < 2 * LANES; j++)
            out[w_kind == BFLOAT16 ? j % 2 * LANES + j / 2 : j] = numbers[j];
    }
}
