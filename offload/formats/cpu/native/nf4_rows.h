/* Template of `nf4.c` for one level, which says what a weight W and an input are: see there.
 *
 * A block's 64 inputs are STEPS steps of two weights each; a weight's vector holds LANES rows. With two CHAINS the first
 * weights of all steps are one sum and the second ones another, so that none waits for the one before. x lies as it is
 * used: [block, m, INPUTS].
 */

enum { NAME(VECTORS) = WIDTH / LANES, NAME(INPUTS) = 2 * STEPS };

/* Where a step's first or second weight is, of a block's INPUTS. */
#define PLACE(step, second) (CHAINS == 1 ? 2 * (step) + (second) : (step) + (second)*STEPS)

/* What the chains of a block and the totals before it give. */
TARGET ALWAYS void NAME(add_block)(F (*sums)[2], const uint16_t *absmax, float *totals, const int vectors) {
    F sum[NAME(VECTORS)];
    UNROLL
    for (int v = 0; v < vectors; v++)
        sum[v] = CHAINS == 1 ? sums[v][0] : ADD(sums[v][0], sums[v][1]);
    ORDERED(sum, vectors);
    UNROLL
    for (int v = 0; v < vectors; v++, absmax += LANES, totals += LANES)
        STORE(totals, FMA(sum[v], FROM_BF16(absmax), LOAD(totals)));
}

/* A tile with a few `rows` of x: weights are looked up where they are used. */
TARGET ALWAYS void NAME(few)(const Nf4 *p, int64_t tile, const uint32_t *x, const uint16_t *levels, float *totals,
                             const int rows) {
    const Tables tables = TABLES(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m * NAME(INPUTS)) {
        F sums[FEW_ROWS][NAME(VECTORS)][2];
        UNROLL
        for (int r = 0; r < rows; r++)
            UNROLL
            for (int v = 0; v < NAME(VECTORS); v++)
                sums[r][v][0] = sums[r][v][1] = ZERO();
        for (int step = 0; step < STEPS; step++, codes += BLOCK / 2 * WIDTH / STEPS) {
            W weights[2][NAME(VECTORS)];
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
            LOOK_UP(codes, &tables, weights[0], weights[1]);
            UNROLL
            for (int r = 0; r < rows; r++)
                UNROLL
                for (int second = 0; second < 2; second++) {
                    const X input = INPUT(x[r * NAME(INPUTS) + PLACE(step, second)]);
                    UNROLL
                    for (int v = 0; v < NAME(VECTORS); v++) {
                        F *sum = &sums[r][v][CHAINS == 1 ? 0 : second];
                        *sum = DOT(weights[second][v], input, *sum);
                    }
                }
        }
        UNROLL
        for (int r = 0; r < rows; r++)
            NAME(add_block)(sums[r], absmax, totals + r * WIDTH, NAME(VECTORS));
    }
}

#if FEW_ROWS == 1
/* A block of a tile, whose weights are in `panel`, with `rows` rows of x. */
TARGET ALWAYS void NAME(group)(const W *panel, const uint32_t *x, const uint16_t *absmax, float *totals,
                               const int rows) {
    for (int v = 0; v < NAME(VECTORS); v += 2) {
        F sums[GROUP_ROWS][2][2];
        UNROLL
        for (int r = 0; r < rows; r++)
            sums[r][0][0] = sums[r][1][0] = ZERO();
        for (int i = 0; i < NAME(INPUTS); i++)
            UNROLL
            for (int r = 0; r < rows; r++) {
                const X input = INPUT(x[r * NAME(INPUTS) + i]);
                sums[r][0][0] = DOT(panel[i * NAME(VECTORS) + v], input, sums[r][0][0]);
                sums[r][1][0] = DOT(panel[i * NAME(VECTORS) + v + 1], input, sums[r][1][0]);
            }
        UNROLL
        for (int r = 0; r < rows; r++)
            NAME(add_block)(sums[r], absmax + v * LANES, totals + r * WIDTH + v * LANES, 2);
    }
}

/* A tile with `rows` rows of x, up to ROWS: its weights are looked up once, block by block. */
TARGET ALWAYS void NAME(many)(const Nf4 *p, int64_t tile, const uint32_t *x, int rows, const uint16_t *levels,
                              float *totals) {
    const Tables tables = TABLES(levels);
    const uint8_t *codes = p->codes + tile * WIDTH * (p->k / 2);
    const uint16_t *absmax = p->absmax + tile * WIDTH;
    W panel[2 * STEPS * WIDTH / LANES];
    for (int64_t at = 0; at < p->k; at += BLOCK, absmax += p->n, x += p->m * NAME(INPUTS)) {
        for (int step = 0; step < STEPS; step++, codes += WIDTH) {
            _mm_prefetch((const char *)(codes + AHEAD), _MM_HINT_T0);
            W *even = panel + 2 * step * NAME(VECTORS);
            LOOK_UP(codes, &tables, even, even + NAME(VECTORS));
        }
        int r = 0;
        for (; r + GROUP_ROWS <= rows; r += GROUP_ROWS)
            NAME(group)(panel, x + r * NAME(INPUTS), absmax, totals + r * WIDTH, GROUP_ROWS);
        for (; r + 2 <= rows; r += 2)
            NAME(group)(panel, x + r * NAME(INPUTS), absmax, totals + r * WIDTH, 2);
        if (r < rows)
            NAME(group)(panel, x + r * NAME(INPUTS), absmax, totals + r * WIDTH, 1);
    }
}
#endif

/* A tile with `rows` rows of x, up to ROWS. Where registers hold the sums of several, looking up once for all of them is
 * as fast as a panel. */
TARGET static void NAME(tile)(const Nf4 *p, int64_t tile, const uint32_t *x, int rows, const uint16_t *levels,
                              float *totals) {
#if FEW_ROWS == 1
    if (rows > 3) {
        NAME(many)(p, tile, x, rows, levels, totals);
        return;
    }
#endif
    for (; rows >= FEW_ROWS; rows -= FEW_ROWS, x += FEW_ROWS * NAME(INPUTS), totals += FEW_ROWS * WIDTH)
        NAME(few)(p, tile, x, levels, totals, FEW_ROWS);
#define REST(n)                                                                                                        \
    case n:                                                                                                            \
        NAME(few)(p, tile, x, levels, totals, n < FEW_ROWS ? n : 1);                                                   \
        break;
    switch (rows) { REST(1) REST(2) REST(3) REST(4) REST(5) }
#undef REST
}

/* A block's 64 bfloat16 of a row of x as the INPUTS that products take. */
TARGET static void NAME(arrange)(const void *x, uint32_t *out) {
    for (int i = 0; i < STEPS; i++)
        if (2 * STEPS == BLOCK) {
            const uint32_t pair = ((const uint32_t *)x)[i];
            out[PLACE(i, 0)] = pair << 16;
            out[PLACE(i, 1)] = pair & 0xFFFF0000;
        } else {
            const uint64_t pairs = ((const uint64_t *)x)[i];
            out[PLACE(i, 0)] = (uint32_t)pairs;
            out[PLACE(i, 1)] = (uint32_t)(pairs >> 32);
        }
}

/* Totals of one row as bfloat16. */
TARGET static void NAME(put)(const float *totals, uint16_t *y) {
    UNROLL
    for (int v = 0; v < NAME(VECTORS); v++)
        TO_BF16(y + v * LANES, LOAD(totals + v * LANES));
}

#undef PLACE
