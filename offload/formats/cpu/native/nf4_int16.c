/* NF4 products whose inputs are integers of 14 bits: nothing is lost that bfloat16 could show.
 *
 * In each block of 64 inputs x is a power of two times integers up to 8160, so that all of it down to a 32nd of the
 * largest is as it was. A level is an integer over 4096, closer to it than bfloat16. Sums of a block are exact in 32
 * bits: 64 * 8160 * 4096 < 2^31. They are scaled and added up in float32.
 */
#include "nf4.h"

#include "level.h"
#include "nf4_block.h"

enum { STEPS = BLOCK / 2 };
#define Block Block16

#include "simd_8.h"

TARGET static void round_block(const float *values, void *block) {
    Block *out = block;
    const float amount = largest_of(values);
    const int usable = amount >= 0x1p-100f && amount <= FLT_MAX; /* else all counts as zero, or is no number */
    uint32_t bits;
    memcpy(&bits, &amount, sizeof bits);
    /* The power of two that takes the largest to between 2^12 and 2^13. */
    const uint32_t up = usable ? (2 * 127 + 12 - (bits >> 23)) << 23 : 0;
    float factor;
    memcpy(&factor, &up, sizeof factor);
    UNROLL
    for (int i = 0; i < BLOCK / 8; i += 2) {
        V words[2];
        for (int j = 0; j < 2; j++)
            words[j] = usable ? nearest(MUL(LOAD(values + 8 * (i + j)), SPREAD(factor))) : INTEGER_ZERO();
        put_int16(out->pairs + 4 * i, words[0], words[1]);
    }
    out->scale = usable ? 1 / (factor * 4096) : without_integers(amount);
}

#include "simd_end.h"

#ifdef __x86_64__

/* ---- AVX2 ---- */

#include "simd_avx2.h"
#define CHAINS 1
#define START(x) INTEGER_ZERO()

typedef struct {
    __m256i low, high; /* the levels' lower and upper bytes */
} TableAvx2;

TARGET ALWAYS TableAvx2 table_avx2(const int16_t *levels) {
    uint8_t lows[16], highs[16];
    for (int i = 0; i < 16; i++)
        lows[i] = (uint8_t)levels[i], highs[i] = (uint8_t)((uint16_t)levels[i] >> 8);
    const TableAvx2 table = {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lows)),
                             _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)highs))};
    return table;
}

/* 2 inputs of 32 rows. In each two vectors rows 0-3 and 8-11 come first, 4-7 and 12-15 next. */
TARGET ALWAYS void look_up_avx2(const uint8_t *codes, TableAvx2 table, __m256i *weights) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)codes), nibble = _mm256_set1_epi8(15);
    UNROLL
    for (int half = 0; half < 2; half++) {
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, nibble);
        const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
        weights[2 * half] = _mm256_unpacklo_epi8(low, high);
        weights[2 * half + 1] = _mm256_unpackhi_epi8(low, high);
    }
}

#define Table TableAvx2
#define TABLE(levels) table_avx2(levels)
#define LOOK_UP look_up_avx2
#define ORDERED ordered_avx2
#define DOT(sum, weights, x, step)                                                                                     \
    _mm256_add_epi32(sum, _mm256_madd_epi16(weights, _mm256_set1_epi32((x)->pairs[step])))
#include "nf4_rows.h"
#undef NAME
#undef TARGET
#undef DOT

/* ---- AVX-VNNI: product and sum are one instruction ---- */

#define NAME(name) name##_avxvnni
#define TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DOT(sum, weights, x, step) _mm256_dpwssd_avx_epi32(sum, weights, _mm256_set1_epi32((x)->pairs[step]))
#include "nf4_rows.h"
#undef CHAINS
#undef START
#undef Table
#undef TABLE
#undef LOOK_UP
#undef ORDERED
#undef DOT
#include "simd_end.h"

/* ---- AVX-512 ---- */

#include "simd_avx512.h"
#define CHAINS 2
#define START(x) INTEGER_ZERO()
#define ORDERED(v, vectors)
#define Table __m512i
#define TABLE(levels) table_avx512(levels)
#define LOOK_UP look_up_avx512

TARGET ALWAYS __m512i table_avx512(const int16_t *levels) {
    const __m256i half = _mm256_loadu_si256((const __m256i *)levels); /* twice: only four bits of an index count */
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

TARGET ALWAYS void look_up_avx512(const uint8_t *codes, __m512i table, __m512i *weights) {
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    weights[0] = _mm512_permutexvar_epi16(index, table);
    weights[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table);
}

#define DOT(sum, weights, x, step)                                                                                     \
    _mm512_add_epi32(sum, _mm512_madd_epi16(weights, _mm512_set1_epi32((x)->pairs[step])))
#include "nf4_rows.h"
#undef NAME
#undef TARGET
#undef DOT

/* ---- AVX-512 with VNNI ---- */

#define NAME(name) name##_avx512vnni
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define DOT(sum, weights, x, step) _mm512_dpwssd_epi32(sum, weights, _mm512_set1_epi32((x)->pairs[step]))
#include "nf4_rows.h"
#include "simd_end.h"

Nf4Kernel nf4_int16(void) {
    if (level_in_use >= LEVEL_AVX512 && vnni_in_use)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_avx512vnni, many_rows_avx512vnni};
    if (level_in_use >= LEVEL_AVX512)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_avx512, many_rows_avx512};
    if (vnni_in_use)
        return (Nf4Kernel){sizeof(Block), round_block, one_row_avxvnni, many_rows_avxvnni};
    return (Nf4Kernel){sizeof(Block), round_block, one_row_avx2, many_rows_avx2};
}

#else

/* ---- NEON ---- */

#include "simd_neon.h"
#define CHAINS 1
#define START(x) INTEGER_ZERO()
#define ORDERED(v, vectors)

typedef struct {
    uint8x16_t low, high; /* the levels' lower and upper bytes */
} Table;

ALWAYS Table table_neon(const int16_t *levels) {
    const uint8x16x2_t bytes = vld2q_u8((const uint8_t *)levels);
    return (Table){bytes.val[0], bytes.val[1]};
}

/* 2 inputs of 32 rows: each vector has the first input's weights of 8 rows, then the second's. */
ALWAYS void look_up_neon(const uint8_t *codes, Table table, V *weights) {
    const uint8x16x2_t both = vld2q_u8(codes);
    UNROLL
    for (int half = 0; half < 2; half++) {
        int16x8_t w[2][2];
        UNROLL
        for (int input = 0; input < 2; input++) {
            const uint8x16_t code = both.val[input];
            const uint8x16_t index = half ? vshrq_n_u8(code, 4) : vandq_u8(code, vdupq_n_u8(15));
            const uint8x16_t low = vqtbl1q_u8(table.low, index), high = vqtbl1q_u8(table.high, index);
            w[0][input] = vreinterpretq_s16_u8(vzip1q_u8(low, high));
            w[1][input] = vreinterpretq_s16_u8(vzip2q_u8(low, high));
        }
        UNROLL
        for (int i = 0; i < 2; i++)
            weights[2 * half + i] = (V){vreinterpretq_s32_s16(w[i][0]), vreinterpretq_s32_s16(w[i][1])};
    }
}

ALWAYS V dot_neon(V sum, V weights, const Block *x, int step) {
    const int16x4_t pair = vreinterpret_s16_s32(vld1_dup_s32(x->pairs + step));
    const int16x8_t first = vreinterpretq_s16_s32(weights.a), second = vreinterpretq_s16_s32(weights.b);
    sum.a = vmlal_lane_s16(sum.a, vget_low_s16(first), pair, 0);
    sum.b = vmlal_high_lane_s16(sum.b, first, pair, 0);
    sum.a = vmlal_lane_s16(sum.a, vget_low_s16(second), pair, 1);
    sum.b = vmlal_high_lane_s16(sum.b, second, pair, 1);
    return sum;
}

#define TABLE(levels) table_neon(levels)
#define LOOK_UP look_up_neon
#define DOT dot_neon
#include "nf4_rows.h"
#include "simd_end.h"

Nf4Kernel nf4_int16(void) { return (Nf4Kernel){sizeof(Block), round_block, one_row_neon, many_rows_neon}; }

#endif
