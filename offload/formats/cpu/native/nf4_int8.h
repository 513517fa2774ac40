/* Products with NF4 matrices in integers: see the beginning of `nf4_int8.c`. */
#ifndef OFFLOAD_NF4_INT8_H
#define OFFLOAD_NF4_INT8_H

#include <stdint.h>

#include "nf4.h"

/* All products, which are of one shape, on up to `threads` threads. `levels` are the 16 levels in 127ths. `room` has
 * m * k words for each different x: there is one, if `shared`. */
void nf4_int8_products(const Nf4 *products, int count, int shared, const int8_t *levels, void *room, int threads);

#endif
