/* NF4 codes between bitsandbytes' order and the one that `nf4.c` multiplies; `offload.formats.cpu.nf4` describes both.
 *
 * A byte of the first holds two inputs of a row, the even one in the high nibble; of the second, the same input of two
 * rows that are 16 apart. So nibbles are exchanged between rows, and 16 x 16 bytes transposed at a time.
 */
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <emmintrin.h>

enum { ROWS = 32, HALF = 16 };

/* 16 x 16 bytes, a row in each register. */
static inline void transpose(__m128i *row) {
    __m128i other[HALF];
    for (int i = 0; i < 8; i++) {
        other[2 * i] = _mm_unpacklo_epi8(row[i], row[i + 8]);
        other[2 * i + 1] = _mm_unpackhi_epi8(row[i], row[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        row[2 * i] = _mm_unpacklo_epi8(other[i], other[i + 8]);
        row[2 * i + 1] = _mm_unpackhi_epi8(other[i], other[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        other[2 * i] = _mm_unpacklo_epi8(row[i], row[i + 8]);
        other[2 * i + 1] = _mm_unpackhi_epi8(row[i], row[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        row[2 * i] = _mm_unpacklo_epi8(other[i], other[i + 8]);
        row[2 * i + 1] = _mm_unpackhi_epi8(other[i], other[i + 8]);
    }
}

static inline __m128i high(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8((char)0xF0)); }
static inline __m128i low(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(0x0F)); }
static inline __m128i up(__m128i bytes) { return high(_mm_slli_epi16(bytes, 4)); }
static inline __m128i down(__m128i bytes) { return low(_mm_srli_epi16(bytes, 4)); }

/* codes [n, half] -> packed [n / 32, half, 32]; n is a multiple of 32, half of 16. */
void nf4_pack(const uint8_t *codes, uint8_t *packed, int64_t n, int64_t half) {
    for (int64_t block = 0; block < n / ROWS; block++, codes += ROWS * half, packed += ROWS * half)
        for (int64_t p = 0; p < half; p += HALF) {
            __m128i even[HALF], odd[HALF];
            for (int r = 0; r < HALF; r++) {
                __m128i first = _mm_loadu_si128((const __m128i *)(codes + r * half + p));
                __m128i second = _mm_loadu_si128((const __m128i *)(codes + (r + HALF) * half + p));
                even[r] = _mm_or_si128(down(first), high(second));
                odd[r] = _mm_or_si128(low(first), up(second));
            }
            transpose(even);
            transpose(odd);
            for (int i = 0; i < HALF; i++) {
                __m128i *out = (__m128i *)(packed + (p + i) * ROWS);
                _mm_storeu_si128(out, _mm_unpacklo_epi8(even[i], odd[i]));
                _mm_storeu_si128(out + 1, _mm_unpackhi_epi8(even[i], odd[i]));
            }
        }
}

/* Whether this was compiled for a processor that the kernels are written for. */
int kernels_are_there(void) { return 1; }

/* The inverse. */
void nf4_unpack(const uint8_t *packed, uint8_t *codes, int64_t n, int64_t half) {
    const __m128i byte = _mm_set1_epi16(0xFF);
    for (int64_t block = 0; block < n / ROWS; block++, codes += ROWS * half, packed += ROWS * half)
        for (int64_t p = 0; p < half; p += HALF) {
            __m128i even[HALF], odd[HALF];
            for (int i = 0; i < HALF; i++) {
                const __m128i *in = (const __m128i *)(packed + (p + i) * ROWS);
                __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
                even[i] = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
                odd[i] = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
            }
            transpose(even);
            transpose(odd);
            for (int r = 0; r < HALF; r++) {
                __m128i first = _mm_or_si128(up(even[r]), low(odd[r]));
                __m128i second = _mm_or_si128(high(even[r]), down(odd[r]));
                _mm_storeu_si128((__m128i *)(codes + r * half + p), first);
                _mm_storeu_si128((__m128i *)(codes + (r + HALF) * half + p), second);
            }
        }
}

#else

int kernels_are_there(void) { return 0; }
void nf4_pack(const uint8_t *codes, uint8_t *packed, int64_t n, int64_t half) {
    (void)codes, (void)packed, (void)n, (void)half;
}
void nf4_unpack(const uint8_t *packed, uint8_t *codes, int64_t n, int64_t half) {
    (void)codes, (void)packed, (void)n, (void)half;
}

#endif
