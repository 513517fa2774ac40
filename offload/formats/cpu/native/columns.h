/* Products of any number of rows with matrices whose outputs lie side by side, input by input: y = x W, several at once.
 *
 * Those are plain matrices kept as [k, n], and those in the nested format. Weights are made float32 a block of inputs at
 * a time, once for all rows. What a row of x gives is the same chain of operations, and so the same bits, whatever rows
 * come with it: a block's products one after the other, then added to the blocks before.
 */
#ifndef OFFLOAD_COLUMNS_H
#define OFFLOAD_COLUMNS_H

#include <stdint.h>

typedef struct {
    const void *x;          /* [m, k]: float32, bfloat16 or float16 */
    const void *w;          /* plain: [k, n]; nested: the upper codes [n / 64, rows_of_codes, 32] */
    const uint8_t *low;     /* nested8: the lower codes, as the upper ones */
    const uint32_t *groups; /* nested: [ceil(k / 64), n], step in the lower half of a word, zero in the upper one */
    void *y;                /* [m, n], as x */
    int64_t m, n, k;        /* n a multiple of 64 */
    int64_t rows_of_codes;  /* nested: k or one more */
} Columns;

/* All products, which are of one shape, on up to `threads` threads. `room` has m * k floats, k rounded up to a multiple
 * of 64, for each different x: there is one, if `shared`. */
void columns_products(const Columns *products, int count, int shared, int x_kind, int w_kind, float *room,
                      int threads);

#endif
