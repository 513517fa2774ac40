/* Products with NF4 matrices whose inputs are rounded to 8 bits, too: `nf4.c`'s, in integers.
 *
 * In each block of 64 inputs x is a scale times integers from -127 to 127, and a level is an integer of that range over
 * 127. Sums of a block are exact, so that all levels of processors give the same ones; they are scaled and added up in
 * float32, block by block.
 */
#include "nf4.h"

#include "level.h"
#include "nf4_block.h"

enum { STEPS = BLOCK / 4 };
#define Block Block8

#include "simd_8.h"

TARGET static void round_block(const float *values, void *block) {
    Block *out = block;
    const float amount = largest_of(values);
    const int usable = amount >= FLT_MIN * 127 && amount <= FLT_MAX; /* else all are zero, or nothing is a number */
    const float inverse = usable ? 127 / amount : 0;
    V sums = INTEGER_ZERO();
    UNROLL
    for (int i = 0; i < BLOCK / 8; i += 4) {
        V words[4];
        for (int j = 0; j < 4; j++) {
            words[j] = usable ? nearest(MUL(LOAD(values + 8 * (i + j)), SPREAD(inverse))) : INTEGER_ZERO();
            sums = INTEGER_ADD(sums, words[j]);
        }
        put_int8(out->quads + 2 * i, out->amounts + 2 * i, words);
    }
    int32_t lanes[8], sum = 0;
    memcpy(lanes, &sums, sizeof lanes);
    for (int i = 0; i < 8; i++)
        sum += lanes[i];
    out->scale = usable ? amount / (127 * 127) : without_integers(amount);
    out->start = -128 * sum;
}

#include "simd_end.h"

#ifdef __x86_64__

/* ---- AVX2: amounts of x times weights with x's signs, as products take one factor without a sign ---- */

#include "simd_avx2.h"
#define CHAINS 1
#define START(x) INTEGER_ZERO()
#define Table __m256i
#define TABLE(levels) _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(levels)))

/* 4 inputs of 32 rows. In each two vectors rows 0-3 and 8-11 come first, 4-7 and 12-15 next. */
TARGET ALWAYS void look_up_avx2(const uint8_t *codes, __m256i table, __m256i *weights) {
    const __m256i a = _mm256_loadu_si256((const __m256i *)codes);
    const __m256i b = _mm256_loadu_si256((const __m256i *)(codes + WIDTH));
    const __m256i both[2] = {_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)};
    const __m256i nibble = _mm256_set1_epi8(15);
    UNROLL
    for (int i = 0; i < 2; i++) {
        weights[i] = _mm256_shuffle_epi8(table, _mm256_and_si256(both[i], nibble));
        weights[2 + i] = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(both[i], 4), nibble));
    }
}

TARGET ALWAYS __m256i dot_avx2(__m256i sum, __m256i weights, const Block *x, int step) {
    const __m256i signs = _mm256_set1_epi32(x->quads[step]), amounts = _mm256_set1_epi32(x->amounts[step]);
    const __m256i pairs = _mm256_maddubs_epi16(amounts, _mm256_sign_epi8(weights, signs));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#define LOOK_UP look_up_avx2
#define ORDERED ordered_avx2
#define DOT dot_avx2
#include "nf4_rows.h"
#undef NAME
#undef TARGET
#undef START
#undef TABLE
#undef DOT

/* ---- AVX-VNNI: weights larger by 128, so that they have no sign ---- */

#define NAME(name) name##_avxvnni
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define START(x) _mm256_set1_epi32((x)->start)
#define TABLE(levels)                                                                                                  \
    _mm256_xor_si256(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(levels))), _mm256_set1_epi8(-128))
#define DOT(sum, weights, x, step) _mm256_dpbusd_avx_epi32(sum, weights, _mm256_set1_epi32((x)->quads[step]))
#include "nf4_rows.h"
#undef CHAINS
#undef START
#undef Table
#undef TABLE
#undef LOOK_UP
#undef ORDERED
#undef DOT
#include "simd_end.h"

/* ---- AVX-512 with VNNI: the same ---- */

#include "simd_avx512.h"
#undef NAME
#undef TARGET
#define NAME(name) name##_avx512vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define CHAINS 2
#define Table __m512i
#define START(x) _mm512_set1_epi32((x)->start)
#define TABLE(levels)                                                                                                  \
    _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(levels))), _mm512_set1_epi8(-128))
#define DOT(sum, weights, x, step) _mm512_dpbusd_epi32(sum, weights, _mm512_set1_epi32((x)->quads[step]))
#define ORDERED(v, vectors)

TARGET ALWAYS void look_up_avx512vnni(const uint8_t *codes, __m512i table, __m512i *weights) {
    const __m512i a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)codes));
    const __m512i b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(codes + WIDTH)));
    const __m512i both = _mm512_or_si512(a, _mm512_slli_epi32(b, 16)), nibble = _mm512_set1_epi8(15);
    weights[0] = _mm512_shuffle_epi8(table, _mm512_and_si512(both, nibble));
    weights[1] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble));
}

#define LOOK_UP look_up_avx512vnni
#include "nf4_rows.h"
#include "simd_end.h"

Nf4Kernel nf4_int8(void) {
    if (vnni_in_use && level_in_use >= LEVEL_AVX512)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_avx512vnni, many_rows_avx512vnni};
    if (vnni_in_use)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_avxvnni, many_rows_avxvnni};
    return (Nf4Kernel){sizeof(Block), round_block, one_row_avx2, many_rows_avx2};
}

#else

/* ---- NEON: products of 16 bits, two of which have room in 16 bits as well ---- */

#include "simd_neon.h"
#define CHAINS 1
#define START(x) INTEGER_ZERO()
#define Table int8x16_t
#define TABLE(levels) vld1q_s8(levels)
#define ORDERED(v, vectors)

/* 4 inputs of 32 rows. */
ALWAYS void look_up_neon(const uint8_t *codes, int8x16_t table, V *weights) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        const uint16x8_t a = vld1q_u16((const uint16_t *)codes + 8 * i);
        const uint16x8_t b = vld1q_u16((const uint16_t *)(codes + WIDTH) + 8 * i);
        const uint8x16_t both[2] = {vreinterpretq_u8_u16(vzip1q_u16(a, b)), vreinterpretq_u8_u16(vzip2q_u16(a, b))};
        int32x4_t low[2], high[2];
        UNROLL
        for (int j = 0; j < 2; j++) {
            low[j] = vreinterpretq_s32_s8(vqtbl1q_s8(table, vandq_u8(both[j], vdupq_n_u8(15))));
            high[j] = vreinterpretq_s32_s8(vqtbl1q_s8(table, vshrq_n_u8(both[j], 4)));
        }
        weights[i] = (V){low[0], low[1]};
        weights[2 + i] = (V){high[0], high[1]};
    }
}

ALWAYS int32x4_t add_dots(int32x4_t sum, int32x4_t weights, int8x16_t x) {
    const int8x16_t w = vreinterpretq_s8_s32(weights);
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x)));
}

ALWAYS V dot_neon(V sum, V weights, const Block *x, int step) {
    const int8x16_t quad = vreinterpretq_s8_s32(vld1q_dup_s32(x->quads + step));
    return (V){add_dots(sum.a, weights.a, quad), add_dots(sum.b, weights.b, quad)};
}

#define LOOK_UP look_up_neon
#define DOT dot_neon
#include "nf4_rows.h"
#undef NAME
#undef TARGET
#undef DOT

/* ---- NEON with dot products ---- */

#define NAME(name) name##_dotprod
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

TARGET ALWAYS V dot_dotprod(V sum, V weights, const Block *x, int step) {
    const int8x16_t quad = vreinterpretq_s8_s32(vld1q_dup_s32(x->quads + step));
    sum.a = vdotq_s32(sum.a, vreinterpretq_s8_s32(weights.a), quad);
    sum.b = vdotq_s32(sum.b, vreinterpretq_s8_s32(weights.b), quad);
    return sum;
}

#define DOT dot_dotprod
#include "nf4_rows.h"
#include "simd_end.h"

Nf4Kernel nf4_int8(void) {
    if (level_in_use >= LEVEL_NEON_DOTPROD)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_dotprod, many_rows_dotprod};
    return (Nf4Kernel){sizeof(Block), round_block, one_row_neon, many_rows_neon};
}

#endif
