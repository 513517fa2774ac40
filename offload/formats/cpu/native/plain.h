/* Products of any number of rows with matrices whose numbers lie row by row: y = x W^T, several matrices at once.
 *
 * Sums are float32. Each of y's numbers is the same chain of operations whatever the other rows are, how many there
 * are, and how many threads compute: lane by lane along k, the lanes added up after each CHUNK inputs. So a row alone has
 * the bits that it has in a prompt.
 */
#ifndef OFFLOAD_PLAIN_H
#define OFFLOAD_PLAIN_H

#include <stdint.h>

typedef struct {
    const void *x;      /* [m, k]: float32, bfloat16 or float16 */
    const void *w;      /* [n, k]: bfloat16, float16 or int8 */
    const void *scales; /* bfloat16 [n], of an int8 matrix */
    void *y;            /* [m, n], as x */
    int64_t m, n, k;    /* k a multiple of 32 */
} Plain;

/* All products, which are of one shape, on up to `threads` threads. `room` has m * (k + 16)
 * floats for each different x: there is one, if `shared`. */
void plain_products(const Plain *products, int count, int shared, int x_kind, int w_kind, float *room, int threads);

#endif
