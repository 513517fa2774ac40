/* Products with NF4 matrices on x86 CPUs: y = x W^T, several matrices at once.
 *
 * A matrix [n, k] lies as `offload.formats.cpu.nf4` packs it: tiles of 32 rows, in them for each pair of inputs 32
 * bytes, two for each row r < 16: row r's codes in the low nibbles, those of row r + 16 in the high ones. `absmax` is
 * bfloat16 [k / 64, n]. x and y are bfloat16, sums float32, block by block of 64 inputs. n is a multiple of 32, k of 64.
 *
 * What a row of x gives is the same chain of operations, and so the same bits, whatever rows come with it.
 */
#include "nf4.h"

#include "level.h"
#include "pool.h"

#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include "numbers.h"

/* ---- AVX2: float32 products, one chain of a block's inputs ---- */

#include "simd_avx2.h"

typedef struct {
    __m256i low, high; /* the levels' lower and upper bytes */
} TablesAvx2;

TARGET ALWAYS TablesAvx2 tables_avx2(const uint16_t *levels) {
    uint8_t lows[16], highs[16];
    for (int i = 0; i < 16; i++)
        lows[i] = (uint8_t)levels[i], highs[i] = (uint8_t)(levels[i] >> 8);
    const TablesAvx2 tables = {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)lows)),
                               _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)highs))};
    return tables;
}

/* A pair of inputs of 32 rows. In each two vectors rows 0-3 and 8-11 come first, 4-7 and 12-15 next. */
TARGET ALWAYS void look_up_avx2(const uint8_t *codes, const TablesAvx2 *tables, __m256 *even, __m256 *odd) {
    const __m256i both = _mm256_loadu_si256((const __m256i *)codes), upper = _mm256_set1_epi32((int)0xFFFF0000);
    for (int half = 0; half < 2; half++) {
        const __m256i index = _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, _mm256_set1_epi8(15));
        const __m256i low = _mm256_shuffle_epi8(tables->low, index), high = _mm256_shuffle_epi8(tables->high, index);
        const __m256i words[2] = {_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
        for (int i = 0; i < 2; i++) {
            even[2 * half + i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
            odd[2 * half + i] = _mm256_castsi256_ps(_mm256_and_si256(words[i], upper));
        }
    }
}

/* 8 float32 -> bfloat16, nearest even. */
TARGET ALWAYS void to_bf16_avx2(uint16_t *out, __m256 values) {
    __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0xD8);
    _mm_storeu_si128((__m128i *)out, _mm256_castsi256_si128(words));
}

#define STEPS 32
#define CHAINS 1
#define FEW_ROWS 1
#define W __m256
#define X __m256
#define Tables TablesAvx2
#define TABLES tables_avx2
#define LOOK_UP look_up_avx2
#define ORDERED ordered_avx2
#define TO_BF16 to_bf16_avx2
#define INPUT(bits) _mm256_castsi256_ps(_mm256_set1_epi32((int)(bits)))
#define DOT(w, x, sum) _mm256_fmadd_ps(w, x, sum)
#include "nf4_rows.h"
#undef STEPS
#undef CHAINS
#undef FEW_ROWS
#undef W
#undef X
#undef Tables
#undef TABLES
#undef LOOK_UP
#undef ORDERED
#undef TO_BF16
#undef INPUT
#undef DOT
#include "simd_end.h"

/* ---- AVX-512: one chain of a block's even inputs and one of its odd ones ---- */

#include "simd_avx512.h"

TARGET ALWAYS __m512i tables_avx512(const uint16_t *levels) {
    const __m256i half = _mm256_loadu_si256((const __m256i *)levels); /* twice: only four bits of an index count */
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

/* A pair of inputs of 32 rows as words of two bfloat16. */
TARGET ALWAYS void words_avx512(const uint8_t *codes, const __m512i *table, __m512i *words) {
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    words[0] = _mm512_permutexvar_epi16(index, *table);
    words[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), *table);
}

TARGET ALWAYS void look_up_avx512(const uint8_t *codes, const __m512i *table, __m512 *even, __m512 *odd) {
    __m512i words[2];
    words_avx512(codes, table, words);
    for (int i = 0; i < 2; i++) {
        even[i] = _mm512_castsi512_ps(_mm512_slli_epi32(words[i], 16));
        odd[i] = _mm512_castsi512_ps(_mm512_and_si512(words[i], _mm512_set1_epi32((int)0xFFFF0000)));
    }
}

TARGET ALWAYS void to_bf16_avx512(uint16_t *out, __m512 values) {
    __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    _mm256_storeu_si256((__m256i *)out, _mm512_cvtepi32_epi16(bits));
}

#define STEPS 32
#define CHAINS 2
#define FEW_ROWS 6
#define W __m512
#define X __m512
#define Tables __m512i
#define TABLES tables_avx512
#define LOOK_UP look_up_avx512
#define ORDERED(v, vectors)
#define TO_BF16 to_bf16_avx512
#define INPUT(bits) _mm512_castsi512_ps(_mm512_set1_epi32((int)(bits)))
#define DOT(w, x, sum) _mm512_fmadd_ps(w, x, sum)
#include "nf4_rows.h"
#undef NAME
#undef TARGET
#undef STEPS
#undef FEW_ROWS
#undef W
#undef X
#undef LOOK_UP
#undef TO_BF16
#undef INPUT
#undef DOT

/* ---- AVX-512 with bfloat16 products: one chain of a block's even pairs of inputs and one of its odd ones ---- */

#define NAME(name) name##_avx512bf16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")))
#define STEPS 16
#define FEW_ROWS 4
#define W __m512i
#define X __m512bh
#define LOOK_UP(codes, tables, even, odd)                                                                              \
    (words_avx512(codes, tables, even), words_avx512((codes) + WIDTH, tables, odd))
#define TO_BF16(out, values) _mm256_storeu_si256((__m256i *)(out), (__m256i)_mm512_cvtneps_pbh(values))
#define INPUT(bits) ((__m512bh)_mm512_set1_epi32((int)(bits)))
#define DOT(w, x, sum) _mm512_dpbf16_ps(sum, (__m512bh)(w), x)
#include "nf4_rows.h"
#include "simd_end.h"

/* ---- which of them, and the pool ---- */

typedef struct {
    void (*tile)(const Nf4 *p, int64_t tile, const uint32_t *x, int rows, const uint16_t *levels, float *totals);
    void (*put)(const float *totals, uint16_t *y);
    void (*arrange)(const void *x, uint32_t *out);
    int inputs; /* of a block: words of one float32 or two bfloat16 */
} Kernel;

static const Kernel kernels[] = {
    [LEVEL_AVX2] = {tile_avx2, put_avx2, arrange_avx2, INPUTS_avx2},
    [LEVEL_AVX512] = {tile_avx512, put_avx512, arrange_avx512, INPUTS_avx512},
    [LEVEL_AVX512_BF16] = {tile_avx512bf16, put_avx512bf16, arrange_avx512bf16, INPUTS_avx512bf16},
};

typedef struct {
    const Nf4 *products;
    const uint16_t *levels; /* the 16 levels, bfloat16 */
    uint32_t *room;
    int shared; /* one x for all */
    Kernel kernel;
} Job;

static int64_t words_of(const Job *job, const Nf4 *p) { return p->k / BLOCK * p->m * job->kernel.inputs; }

static void prepare(const void *argument, int index) {
    const Job *job = argument;
    const int64_t m = job->products->m, blocks = (m + ROWS - 1) / ROWS, from = index % blocks * ROWS;
    const Nf4 *p = job->products + index / blocks;
    uint32_t *out = job->room + index / blocks * words_of(job, p);
    for (int64_t row = from; row < m && row < from + ROWS; row++)
        for (int64_t block = 0; block < p->k / BLOCK; block++)
            job->kernel.arrange(p->x + row * p->k + block * BLOCK, out + (block * m + row) * job->kernel.inputs);
}

static void multiply(const void *argument, int index) {
    const Job *job = argument;
    const int64_t tiles = job->products->n / WIDTH, tile = index % tiles;
    const Nf4 *p = job->products + index / tiles;
    const uint32_t *x = job->room + (job->shared ? 0 : index / tiles * words_of(job, p));
    float totals[ROWS * WIDTH];
    for (int64_t row = 0; row < p->m; row += ROWS) {
        const int rows = p->m - row < ROWS ? (int)(p->m - row) : ROWS;
        memset(totals, 0, (size_t)rows * WIDTH * sizeof(float));
        job->kernel.tile(p, tile, x + row * job->kernel.inputs, rows, job->levels, totals);
        for (int r = 0; r < rows; r++)
            job->kernel.put(totals + r * WIDTH, p->y + (row + r) * p->n + tile * WIDTH);
    }
}

/* All products, which are of one shape, on up to `threads` threads. `room` has m * k words for each different x: there
 * is one, if `shared`. */
void nf4_products(const Nf4 *products, int count, int shared, const uint16_t *levels, uint32_t *room, int threads) {
    const Job job = {products, levels, room, shared, kernels[level_in_use]};
    const int64_t blocks = (products->m + ROWS - 1) / ROWS;
    pool_run(prepare, &job, (int)(shared ? blocks : blocks * count), products->m > 1 ? threads : 1);
    pool_run(multiply, &job, (int)(products->n / WIDTH * count), threads);
}

#else

void nf4_products(const Nf4 *products, int count, int shared, const uint16_t *levels, uint32_t *room, int threads) {
    (void)products, (void)count, (void)shared, (void)levels, (void)room, (void)threads;
}

#endif
