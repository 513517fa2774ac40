/* The nested format: planes joined, missing bits filled in, weights dequantised.
 *
 * `offload.formats.nested` describes the planes: `high` is [n / 64, k / 2, 32] bytes, `third` and `fourth` half of that,
 * rounded up, `upper` and `low` [n / 64, k, 32], where byte j of an input has the code of row j in its low nibble and that of row j + 32 in its high
 * one. `groups` are pairs of bfloat16, step and zero, [ceil(k / 64), n].
 *
 * Compiled with -ffp-contract=off: dequantised weights have the bits that torch's own operations give.
 */
#include "level.h"
#include "pool.h"
#include "simd_8.h"

#include <stdint.h>

enum { ROWS = 64, HALF = 32, GROUP = 64 };

/* ---- bits ---- */

TARGET ALWAYS void put_upper(uint8_t high, uint8_t next, uint8_t *first, uint8_t *second) {
    *first = (high & 0xCC) | (next & 0x33);
    *second = (uint8_t)((high & 0x33) << 2) | (next >> 2 & 0x33);
}

TARGET ALWAYS void upper_block(const uint8_t *high, const uint8_t *third, const uint8_t *fourth, uint8_t *upper,
                               int64_t length, int64_t quarter, const int has_fourth) {
    for (int64_t i = 0; i < quarter; i++)
        put_upper(high[i], (third[i] & 0xAA) | (has_fourth ? fourth[i] & 0x55 : 0), upper + i, upper + length + i);
    high += quarter, upper += quarter;
    for (int64_t i = 0; i < length - quarter; i++)
        put_upper(high[i], (uint8_t)((third[i] & 0x55) << 1) | (has_fourth ? fourth[i] >> 1 & 0x55 : 0), upper + i,
                  upper + length + i);
}

TARGET static void upper_of_3(const uint8_t *high, const uint8_t *third, uint8_t *upper, int64_t length, int64_t quarter) {
    upper_block(high, third, 0, upper, length, quarter, 0);
}

TARGET static void upper_of_4(const uint8_t *high, const uint8_t *third, const uint8_t *fourth, uint8_t *upper,
                              int64_t length, int64_t quarter) {
    upper_block(high, third, fourth, upper, length, quarter, 1);
}

/* 10 in the lower half of the range, 01 in the upper one: 2 minus the highest bit. */
TARGET static void fill_block(const uint8_t *high, uint8_t *upper, int64_t length) {
    for (int64_t i = 0; i < length; i++)
        upper[i] = (uint8_t)((high[i] & 0xCC) + 0x22 - (high[i] >> 3 & 0x11));
    for (int64_t i = 0; i < length; i++)
        upper[length + i] = (uint8_t)(((high[i] & 0x33) << 2) + 0x22 - (high[i] >> 1 & 0x11));
}

/* ---- weights ---- */

typedef struct {
    const uint32_t *groups; /* [ceil(k / 64), n]: step in the lower half of a word, zero in the upper one */
    const uint8_t *upper, *low; /* [n / 64, k, 32]; no `low`: 4 bits */
    void *out;                  /* [k, n], bfloat16 or float32 */
    int64_t n, k;
    int wide;     /* float32 */
    float middle; /* without `low`, the code that means zero */
} Weights;

/* The rows of a block are taken in turns: a turn's codes are the low or the high nibbles of some bytes in a row. What a
 * code means is exact in float32; its product with the step is rounded, and so is the sum with zero. */
/* zero + step * (code - middle) */
#define EIGHT_BITS 8.46875f /* zero + step * (high - 8 - 7.5 / 16 + low / 16) */

/* ---- AVX-512 ---- */

#ifdef __x86_64__

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl")))

AVX512 ALWAYS __m512 codes512(const uint8_t *bytes, int turn) {
    __m128i codes = _mm_loadu_si128((const __m128i *)(bytes + turn % 2 * 16));
    codes = _mm_and_si128(turn < 2 ? codes : _mm_srli_epi16(codes, 4), _mm_set1_epi8(15));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes));
}

/* 16 float32 -> bfloat16, nearest even. What is no number stays none: its lower bits were those of a bfloat16. */
AVX512 ALWAYS __m256i narrow512(__m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

/* The inputs of one group. */
AVX512 ALWAYS void weights512(const Weights *w, int64_t group, const int has_low, const int wide) {
    const int64_t begin = group * GROUP, end = begin + GROUP < w->k ? begin + GROUP : w->k;
    for (int64_t row = 0; row < w->n; row += ROWS) {
        __m512 step[4], zero[4];
        for (int turn = 0; turn < 4; turn++) {
            __m512i pairs = _mm512_loadu_si512(w->groups + group * w->n + row + 16 * turn);
            step[turn] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            zero[turn] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
        }
        for (int64_t i = begin; i < end; i++) {
            const int64_t codes = (row / ROWS * w->k + i) * HALF;
            for (int turn = 0; turn < 4; turn++) {
                __m512 value = codes512(w->upper + codes, turn);
                value = _mm512_sub_ps(value, _mm512_set1_ps(has_low ? EIGHT_BITS : w->middle));
                if (has_low)
                    value = _mm512_add_ps(value, _mm512_mul_ps(codes512(w->low + codes, turn), _mm512_set1_ps(.0625f)));
                value = _mm512_add_ps(_mm512_mul_ps(value, step[turn]), zero[turn]);
                const int64_t at = i * w->n + row + 16 * turn;
                if (wide)
                    _mm512_storeu_ps((float *)w->out + at, value);
                else
                    _mm256_storeu_si256((__m256i *)((uint16_t *)w->out + at), narrow512(value));
            }
        }
    }
}

#endif

/* ---- AVX2 and NEON: the same, half a block at a time, 8 rows a turn ---- */

#ifdef __x86_64__
/* 8 float32 -> bfloat16, nearest even. What is no number stays none, as above. */
TARGET ALWAYS void put8(uint16_t *at, F values) {
    __m256i bits = _mm256_castps_si256(values);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    bits = _mm256_srli_epi32(bits, 16);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
    _mm_storeu_si128((__m128i *)at, words);
}
#else
ALWAYS void put8(uint16_t *at, F values) { PUT_BF16(at, values); }
#endif

TARGET ALWAYS F codes8(const uint8_t *bytes, int high) { return high ? FROM_HIGH(bytes) : FROM_LOW(bytes); }

TARGET ALWAYS void weights8(const Weights *w, int64_t group, const int has_low, const int wide) {
    const int64_t begin = group * GROUP, end = begin + GROUP < w->k ? begin + GROUP : w->k;
    for (int64_t row = 0; row < w->n; row += HALF) {
        const int high = row % ROWS != 0;
        F step[4], zero[4];
        for (int turn = 0; turn < 4; turn++) {
            const uint32_t *pairs = w->groups + group * w->n + row + 8 * turn;
            step[turn] = BF16_EVEN(pairs), zero[turn] = BF16_ODD(pairs);
        }
        for (int64_t i = begin; i < end; i++)
            for (int turn = 0; turn < 4; turn++) {
                const int64_t codes = (row / ROWS * w->k + i) * HALF + 8 * turn, at = i * w->n + row + 8 * turn;
                F value = SUB(codes8(w->upper + codes, high), SPREAD(has_low ? EIGHT_BITS : w->middle));
                if (has_low)
                    value = ADD(value, MUL(codes8(w->low + codes, high), SPREAD(.0625f)));
                value = ADD(MUL(value, step[turn]), zero[turn]);
                if (wide)
                    STORE((float *)w->out + at, value);
                else
                    put8((uint16_t *)w->out + at, value);
            }
    }
}

/* ---- which of them, and the pool ---- */

/* What is the same for every input is chosen here, so that loops have no branch. */
#define CHOOSE(weights, w, group)                                                                  \
    if ((w)->low)                                                                                  \
        (w)->wide ? weights(w, group, 1, 1) : weights(w, group, 1, 0);                             \
    else                                                                                           \
        (w)->wide ? weights(w, group, 0, 1) : weights(w, group, 0, 0);

#ifdef __x86_64__
AVX512 static void group_avx512(const void *w, int group) { CHOOSE(weights512, (const Weights *)w, group) }
#endif
TARGET static void NAME(group)(const void *w, int group) { CHOOSE(weights8, (const Weights *)w, group) }

/* high [blocks, length], third, and fourth if there is one, [blocks, quarter] -> upper [blocks, 2 length] */
void nested_upper(const uint8_t *high, const uint8_t *third, const uint8_t *fourth, uint8_t *upper, int64_t blocks,
                  int64_t length, int64_t quarter) {
    for (int64_t b = 0; b < blocks; b++, high += length, third += quarter, upper += 2 * length)
        if (fourth)
            upper_of_4(high, third, fourth + b * quarter, upper, length, quarter);
        else
            upper_of_3(high, third, upper, length, quarter);
}

/* high [blocks, length] -> upper [blocks, 2 length] */
void nested_fill(const uint8_t *high, uint8_t *upper, int64_t blocks, int64_t length) {
    for (int64_t b = 0; b < blocks; b++)
        fill_block(high + b * length, upper + 2 * b * length, length);
}

/* On up to `threads` threads. */
void nested_weights(const void *groups, const uint8_t *upper, const uint8_t *low, void *out, int64_t n, int64_t k,
                    int wide, float middle, int threads) {
    Weights w = {groups, upper, low, out, n, k, wide, middle};
    pool_run(WIDEST(group), &w, (int)((k + GROUP - 1) / GROUP), threads);
}
