/* Which instructions the kernels may use: the processor's, or fewer. */
#ifndef OFFLOAD_LEVEL_H
#define OFFLOAD_LEVEL_H

#ifdef __x86_64__
enum { LEVEL_NONE, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16, LEVEL_BEST = LEVEL_AVX512_BF16 };

/* The function of the widest vectors in use, of those that a template gave. */
#define WIDEST(name) (level_in_use >= LEVEL_AVX512 ? name##_avx512 : name##_avx2)
#else
enum { LEVEL_NONE, LEVEL_NEON, LEVEL_NEON_DOTPROD, LEVEL_NEON_BF16, LEVEL_BEST = LEVEL_NEON_BF16 };

#define WIDEST(name) name##_neon
#endif

/* The level in use: that of the processor, until `level_choose`. */
extern int level_in_use;

/* Whether products of 8-bit integers have instructions of their own (VNNI), and they are used. */
extern int vnni_in_use;

/* Use at most `most` from now on; returns what is used. */
int level_choose(int most);

#endif
