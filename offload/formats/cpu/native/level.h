/* Which instructions the kernels may use: the processor's, or fewer. */
#ifndef OFFLOAD_LEVEL_H
#define OFFLOAD_LEVEL_H

enum { LEVEL_NONE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16 };

/* The level in use: that of the processor, until `level_choose`. */
extern int level_in_use;

/* Whether products of 8-bit integers have instructions of their own (VNNI), and they are used. */
extern int vnni_in_use;

/* Use at most `most` from now on; returns what is used. */
int level_choose(int most);

#endif
