/* Template of `nf4_int8.c` for one level, which says what a vector of weights V is: see there. */

enum { NAME(VECTORS) = WIDTH / LANES };

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

/* A tile with one row of x. */
TARGET static void NAME(one_row)(const Nf4 *p, int64_t tile, const Block *x, const int8_t *levels, float *totals) {
    const V table = TABLE(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m) {
        V sums[NAME(VECTORS)];
        UNROLL
        for (int v = 0; v < NAME(VECTORS); v++)
            sums[v] = START(x);
        for (int quad = 0; quad < QUADS; quad++, codes += 2 * WIDTH) {
            V weights[NAME(VECTORS)];
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
            LOOK_UP(codes, table, weights);
            UNROLL
            for (int v = 0; v < NAME(VECTORS); v++)
                sums[v] = DOT(sums[v], weights[v], x, quad);
        }
        NAME(add_block)(sums, x, absmax, totals, NAME(VECTORS));
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
        for (int quad = 0; quad < QUADS; quad++)
            UNROLL
            for (int r = 0; r < rows; r++)
                UNROLL
                for (int c = 0; c < vectors; c++)
                    sums[r][c] = DOT(sums[r][c], panel[quad * NAME(VECTORS) + v + c], x + r, quad);
        UNROLL
        for (int r = 0; r < rows; r++)
            NAME(add_block)(sums[r], x + r, absmax + v * LANES, totals + r * WIDTH + v * LANES, vectors);
    }
}

/* A tile with `rows` rows of x, up to ROWS: its weights are looked up once, block by block. */
TARGET static void NAME(many_rows)(const Nf4 *p, int64_t tile, const Block *x, int rows, const int8_t *levels,
                                   float *totals) {
    const V table = TABLE(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    V panel[QUADS * WIDTH / LANES];
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m) {
        for (int quad = 0; quad < QUADS; quad++, codes += 2 * WIDTH) {
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
            LOOK_UP(codes, table, panel + quad * NAME(VECTORS));
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
