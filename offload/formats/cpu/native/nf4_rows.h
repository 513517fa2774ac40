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
TARGET static void NAME(one_row)(const Nf4 *p, int64_t tile, const void *inputs, const void *levels, float *totals) {
    const Block *x = inputs;
    const Table table = TABLE(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m) {
        V sums[CHAINS][NAME(VECTORS)];
        _mm_prefetch((const char *)(absmax + AHEAD_BLOCKS * p->n), _MM_HINT_T0);
        UNROLL
        for (int v = 0; v < NAME(VECTORS); v++) {
            sums[0][v] = START(x);
            sums[CHAINS - 1][v] = CHAINS > 1 ? INTEGER_ZERO() : sums[0][v];
        }
        for (int step = 0; step < STEPS; step += CHAINS)
            UNROLL
            for (int chain = 0; chain < CHAINS; chain++, codes += NAME(STEP)) {
                V weights[NAME(VECTORS)];
                _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
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

/* A block of a tile, whose weights are in `panel`, with `rows` rows of x. */
TARGET ALWAYS void NAME(group)(const V *panel, const Block *x, const uint16_t *absmax, float *totals, const int rows,
                               const int vectors) {
    for (int v = 0; v < NAME(VECTORS); v += vectors) {
        V sums[GROUP_ROWS][NAME(VECTORS)];
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int c = 0; c < vectors; c++)
                sums[r][c] = START(x + r);
        for (int step = 0; step < STEPS; step++)
            UNROLL
            for (int r = 0; r < rows; r++)
                UNROLL
                for (int c = 0; c < vectors; c++)
                    sums[r][c] = DOT(sums[r][c], panel[step * NAME(VECTORS) + v + c], x + r, step);
        UNROLL
        for (int r = 0; r < rows; r++)
            NAME(add_block)(sums[r], x + r, absmax + v * LANES, totals + r * WIDTH + v * LANES, vectors);
    }
}

/* A tile with `rows` rows of x, up to ROWS: its weights are looked up once, block by block. */
TARGET static void NAME(many_rows)(const Nf4 *p, int64_t tile, const void *inputs, int rows, const void *levels,
                                   float *totals) {
    const Block *x = inputs;
    const Table table = TABLE(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    V panel[STEPS * WIDTH / LANES];
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m) {
        for (int step = 0; step < STEPS; step++, codes += NAME(STEP)) {
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
            LOOK_UP(codes, table, panel + step * NAME(VECTORS));
        }
        int r = 0;
        for (; r + GROUP_ROWS <= rows; r += GROUP_ROWS)
            NAME(group)(panel, x + r, absmax, totals + r * WIDTH, GROUP_ROWS, 2);
        for (; r + 2 <= rows; r += 2)
            NAME(group)(panel, x + r, absmax, totals + r * WIDTH, 2, 2);
        if (r < rows)
            NAME(group)(panel, x + r, absmax, totals + r * WIDTH, 1, 2);
    }
}
