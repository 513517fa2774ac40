/* Template of `nf4_int16.c` and `nf4_int8.c` for one level. They say what a vector of weights V is, and how many STEPS
 * of inputs a block has. */

enum { NAME(VECTORS) = WIDTH / LANES, NAME(STEP) = WIDTH * BLOCK / 2 / STEPS /* bytes of codes */ };

/* The sums of a block, [row][vector], as float32 times the scales of x and of W. */
TARGET ALWAYS void NAME(add_block)(const V *sums, const Block *x, const uint16_t *absmax, float *totals,
                                   const int vectors) {
    F values[NAME(VECTORS)];
    UNROLL
    for (int v = 0; v < vectors; v++)
        values[v] = TO_FLOAT(sums[v]);
    ORDERED(values, vectors);
    const F scale = SPREAD(x->scale);
    UNROLL
    for (int v = 0; v < vectors; v++, absmax += LANES, totals += LANES)
        STORE(totals, FMA(values[v], MUL(FROM_BF16(absmax), scale), LOAD(totals)));
}

/* A tile with one row of x. With two CHAINS no sum waits for the one before. */
TARGET static void NAME(one_row)(const Nf4 *w, int64_t tile, const void *row, const void *levels, float *totals) {
    const Table table = TABLE(levels);
    const uint8_t *codes = w->codes + tile * WIDTH * (w->k / 2);
    const uint16_t *absmax = w->absmax + tile * WIDTH * (w->k / BLOCK);
    const Block *x = row, *end = x + w->k / BLOCK;
    for (; x < end; x++, absmax += WIDTH) {
        V sums[CHAINS][NAME(VECTORS)];
        FETCH_ONCE(absmax + AHEAD_BLOCKS * WIDTH);
        UNROLL
        for (int v = 0; v < NAME(VECTORS); v++) {
            sums[0][v] = START(x);
            sums[CHAINS - 1][v] = CHAINS > 1 ? INTEGER_ZERO() : sums[0][v];
        }
        for (int step = 0; step < STEPS; step += CHAINS)
            UNROLL
            for (int chain = 0; chain < CHAINS; chain++, codes += NAME(STEP)) {
                V weights[NAME(VECTORS)];
                FETCH_ONCE(codes + AHEAD);
                LOOK_UP(codes, table, weights);
                UNROLL
                for (int v = 0; v < NAME(VECTORS); v++)
                    sums[chain][v] = DOT(sums[chain][v], weights[v], x, step + chain);
            }
        UNROLL
        for (int v = 0; CHAINS > 1 && v < NAME(VECTORS); v++)
            sums[0][v] = INTEGER_ADD(sums[0][v], sums[CHAINS - 1][v]);
        NAME(add_block)(sums[0], x, absmax, totals, NAME(VECTORS));
    }
}

/* A block of a tile, whose weights are in `panel`, with `count` rows of x. */
TARGET ALWAYS void NAME(group)(const V *panel, const void *const *rows, int64_t block, const uint16_t *absmax,
                               float *totals, const int count) {
    const Block *x[GROUP_ROWS];
    UNROLL
    for (int r = 0; r < count; r++)
        x[r] = (const Block *)rows[r] + block;
    for (int v = 0; v < NAME(VECTORS); v += 2) {
        V sums[GROUP_ROWS][2];
        UNROLL
        for (int r = 0; r < count; r++)
            sums[r][0] = sums[r][1] = START(x[r]);
        for (int step = 0; step < STEPS; step++)
            UNROLL
            for (int r = 0; r < count; r++)
                UNROLL
                for (int c = 0; c < 2; c++)
                    sums[r][c] = DOT(sums[r][c], panel[step * NAME(VECTORS) + v + c], x[r], step);
        UNROLL
        for (int r = 0; r < count; r++)
            NAME(add_block)(sums[r], x[r], absmax + v * LANES, totals + r * WIDTH + v * LANES, 2);
    }
}

/* A tile with `count` rows of x, up to ROWS: its weights are looked up once, block by block. */
TARGET static void NAME(many_rows)(const Nf4 *w, int64_t tile, const void *const *rows, int count, const void *levels,
                                   float *totals) {
    const Table table = TABLE(levels);
    const uint8_t *codes = w->codes + tile * WIDTH * (w->k / 2);
    const uint16_t *absmax = w->absmax + tile * WIDTH * (w->k / BLOCK);
    V panel[STEPS * WIDTH / LANES];
    for (int64_t block = 0; block < w->k / BLOCK; block++, absmax += WIDTH) {
        for (int step = 0; step < STEPS; step++, codes += NAME(STEP)) {
            FETCH(codes + AHEAD);
            LOOK_UP(codes, table, panel + step * NAME(VECTORS));
        }
        int r = 0;
        for (; r + GROUP_ROWS <= count; r += GROUP_ROWS)
            NAME(group)(panel, rows + r, block, absmax, totals + r * WIDTH, GROUP_ROWS);
        for (; r + 2 <= count; r += 2)
            NAME(group)(panel, rows + r, block, absmax, totals + r * WIDTH, 2);
        if (r < count)
            NAME(group)(panel, rows + r, block, absmax, totals + r * WIDTH, 1);
    }
}
