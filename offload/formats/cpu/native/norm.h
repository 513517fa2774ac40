/* One row's RMSNorm: see `norm.c`. */
#ifndef OFFLOAD_NORM_H
#define OFFLOAD_NORM_H

#include <stdint.h>

/* x [n] over the root of its mean square, times weight [n]; with `twice` it is rounded before that, too. y may be x. */
void norm_row(const uint16_t *x, const uint16_t *weight, uint16_t *y, int64_t n, float epsilon, int twice);

#endif
