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

/* Rows of W that are taken at a time, rows of x, and floats between two rows of x as float32, which lie in other sets of
 * the cache then. */
enum { PLAIN_TILE = 32, PLAIN_ROWS = 48, PLAIN_APART = 16 };

typedef void (*Tile)(const float *x, int64_t x_step, const char *w, int64_t w_step, int64_t length, float *sums,
                     int first, int rows, int count);

typedef struct {
    Tile tile;
    /* A row [k] as float32: for a bfloat16 matrix in groups of 2 * lanes, those at even places first. */
    void (*widen)(const char *x, int x_kind, int w_kind, float *out, int64_t k);
    int64_t lanes, width; /* of vectors; of W's numbers, in bytes */
} PlainKernel;

/* For the level in use, and matrices of this kind. */
PlainKernel plain_kernel(int w_kind);

/* `rows` widened rows of x, up to PLAIN_ROWS, with `count` rows of W, up to PLAIN_TILE: sums [rows, PLAIN_TILE]. */
void plain_tile(const PlainKernel *kernel, const float *x, int rows, const char *w, int64_t k, int count, float *sums);

/* All products, which are of one shape, on up to `threads` threads. `room` has m * (k + 16)
 * floats for each different x: there is one, if `shared`. */
void plain_products(const Plain *products, int count, int shared, int x_kind, int w_kind, float *room, int threads);

#endif
