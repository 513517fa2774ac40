/* Template of `columns.c` for one width of vectors: see simd_avx2.h. */

enum { NAME(VECTORS) = WIDTH / LANES };

/* What LANES codes of 4 bits mean without step and zero: those in the low or in the high halves of so many bytes. */
TARGET ALWAYS F NAME(code)(const uint8_t *bytes, const int high) { return high ? FROM_HIGH(bytes) : FROM_LOW(bytes); }

/* `length` inputs of WIDTH outputs as float32. A nested weight's product with the step is rounded, and so is the sum
 * with zero: as where weights are dequantised by torch. */
TARGET ALWAYS void NAME(nested)(const Columns *p, int64_t at, int64_t first, int length, float *panel, const int low,
                                const int high, const float middle) {
    const uint32_t *groups = p->groups + at / BLOCK * p->n + first;
    const int64_t codes = (first / TILE * p->rows_of_codes + at) * WIDTH;
    const uint8_t *upper = (const uint8_t *)p->w + codes, *lower = p->low + codes;
    F step[NAME(VECTORS)], zero[NAME(VECTORS)];
    for (int v = 0; v < NAME(VECTORS); v++)
        step[v] = BF16_EVEN(groups + v * LANES), zero[v] = BF16_ODD(groups + v * LANES);
    for (int i = 0; i < length; i++, upper += WIDTH, lower += WIDTH, panel += WIDTH) {
        FETCH(upper + AHEAD);
        if (low)
            FETCH(lower + AHEAD);
        UNROLL
        for (int v = 0; v < NAME(VECTORS); v++) {
            F value = SUB(NAME(code)(upper + v * LANES, high), SPREAD(middle));
            if (low)
                value = ADD(value, MUL(NAME(code)(lower + v * LANES, high), SPREAD(.0625f)));
            STORE(panel + v * LANES, ADD(MUL(value, step[v]), zero[v]));
        }
    }
}

TARGET static void NAME(widen)(const Columns *p, int kind, int64_t at, int64_t first, int length, float *panel) {
    const int high = first % TILE != 0;
    const float middle = kind == NESTED3 ? 7.5f : 8.f;
    if (kind == NESTED4 || kind == NESTED3)
        high ? NAME(nested)(p, at, first, length, panel, 0, 1, middle)
             : NAME(nested)(p, at, first, length, panel, 0, 0, middle);
    else if (kind == NESTED8)
        high ? NAME(nested)(p, at, first, length, panel, 1, 1, 8.46875f)
             : NAME(nested)(p, at, first, length, panel, 1, 0, 8.46875f);
    else {
        const uint16_t *w = (const uint16_t *)p->w + at * p->n + first;
        for (int i = 0; i < length; i++, w += p->n, panel += WIDTH) {
            FETCH(w + 4 * WIDTH);
            UNROLL
            for (int v = 0; v < NAME(VECTORS); v++)
                STORE(panel + v * LANES, kind == BFLOAT16 ? FROM_BF16(w + v * LANES) : FROM_FP16(w + v * LANES));
        }
    }
}

/* totals += x W for `rows` rows of x and `length` inputs, two vectors of W at a time. */
TARGET ALWAYS void NAME(group)(const float *panel, const float *x, int length, float *totals, const int rows,
                               const int vectors) {
    for (int v = 0; v < NAME(VECTORS); v += vectors) {
        F sums[GROUP_ROWS][4];
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int c = 0; c < vectors; c++)
                sums[r][c] = ZERO();
        for (int i = 0; i < length; i++)
            UNROLL
            for (int r = 0; r < rows; r++) {
                const F input = SPREAD(x[r * BLOCK + i]);
                UNROLL
                for (int c = 0; c < vectors; c++)
                    sums[r][c] = FMA(LOAD(panel + i * WIDTH + (v + c) * LANES), input, sums[r][c]);
            }
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int c = 0; c < vectors; c++) {
                float *total = totals + r * TILE + (v + c) * LANES;
                STORE(total, ADD(LOAD(total), sums[r][c]));
            }
    }
}

TARGET static void NAME(multiply)(const float *panel, const float *x, int length, float *totals, int rows) {
    for (; rows >= GROUP_ROWS; rows -= GROUP_ROWS, x += GROUP_ROWS * BLOCK, totals += GROUP_ROWS * TILE)
        NAME(group)(panel, x, length, totals, GROUP_ROWS, 2);
    for (; rows >= 3; rows -= 3, x += 3 * BLOCK, totals += 3 * TILE)
        NAME(group)(panel, x, length, totals, 3, 2);
    for (; rows; rows--, x += BLOCK, totals += TILE)
        NAME(group)(panel, x, length, totals, 1, NAME(VECTORS));
}
