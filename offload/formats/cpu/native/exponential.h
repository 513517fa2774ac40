/* e^x of 8 float32, without a library: the same bits on every processor. */
#ifndef OFFLOAD_EXPONENTIAL_H
#define OFFLOAD_EXPONENTIAL_H

#include "simd_8.h"

/* To two units in the last place for x from -87 to 88, and the ends' values beyond. What is no number stays none. */
TARGET ALWAYS F exponential(F x) {
    x = MAX(SPREAD(-87), MIN(SPREAD(88), x));
    const F n = NEAREST(MUL(x, SPREAD(1.44269504f)));
    F r = FMA(n, SPREAD(-0.693359375f), x);
    r = FMA(n, SPREAD(2.12194440e-4f), r);
    F y = SPREAD(1.f / 720);
    const float rest[] = {1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1, 1};
    UNROLL
    for (int i = 0; i < 6; i++)
        y = FMA(y, r, SPREAD(rest[i]));
    return MUL(y, POWER_OF_2(n));
}

#include "simd_end.h"

#endif
