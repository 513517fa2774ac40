/* NF4 codes between bitsandbytes' order and the one that `nf4.c` multiplies; `offload.formats.cpu.nf4` describes both.
 *
 * A byte of the first holds two inputs of a row, the even one in the high nibble; of the second, the same input of two
 * rows that are 16 apart. So nibbles are exchanged between rows, and 16 x 16 bytes transposed at a time.
 */
#include <stdint.h>
#include <string.h>

enum { ROWS = 32, HALF = 16 };

typedef uint8_t Bytes __attribute__((vector_size(16)));

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Bytes){__VA_ARGS__})
#endif

static inline Bytes get(const uint8_t *at) {
    Bytes bytes;
    memcpy(&bytes, at, sizeof bytes);
    return bytes;
}

static inline void put(uint8_t *at, Bytes bytes) { memcpy(at, &bytes, sizeof bytes); }

/* The bytes of two in turns, of their first halves or of their second ones. */
static inline Bytes first_halves(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
static inline Bytes second_halves(Bytes a, Bytes b) {
    return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* 16 x 16 bytes, a row in each register. */
static inline void transpose(Bytes *row) {
    Bytes other[HALF];
    for (int i = 0; i < 8; i++) {
        other[2 * i] = first_halves(row[i], row[i + 8]);
        other[2 * i + 1] = second_halves(row[i], row[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        row[2 * i] = first_halves(other[i], other[i + 8]);
        row[2 * i + 1] = second_halves(other[i], other[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        other[2 * i] = first_halves(row[i], row[i + 8]);
        other[2 * i + 1] = second_halves(row[i], row[i + 8]);
    }
    for (int i = 0; i < 8; i++) {
        row[2 * i] = first_halves(other[i], other[i + 8]);
        row[2 * i + 1] = second_halves(other[i], other[i + 8]);
    }
}

static inline Bytes high(Bytes bytes) { return bytes & 0xF0; }
static inline Bytes low(Bytes bytes) { return bytes & 0x0F; }
static inline Bytes up(Bytes bytes) { return bytes << 4; }
static inline Bytes down(Bytes bytes) { return bytes >> 4; }

/* codes [n, half] -> packed [n / 32, half, 32]; n is a multiple of 32, half of 16. */
void nf4_pack(const uint8_t *codes, uint8_t *packed, int64_t n, int64_t half) {
    for (int64_t block = 0; block < n / ROWS; block++, codes += ROWS * half, packed += ROWS * half)
        for (int64_t p = 0; p < half; p += HALF) {
            Bytes even[HALF], odd[HALF];
            for (int r = 0; r < HALF; r++) {
                const Bytes first = get(codes + r * half + p);
                const Bytes second = get(codes + (r + HALF) * half + p);
                even[r] = down(first) | high(second);
                odd[r] = low(first) | up(second);
            }
            transpose(even);
            transpose(odd);
            for (int i = 0; i < HALF; i++) {
                put(packed + (p + i) * ROWS, first_halves(even[i], odd[i]));
                put(packed + (p + i) * ROWS + HALF, second_halves(even[i], odd[i]));
            }
        }
}

/* The inverse. */
void nf4_unpack(const uint8_t *packed, uint8_t *codes, int64_t n, int64_t half) {
    for (int64_t block = 0; block < n / ROWS; block++, codes += ROWS * half, packed += ROWS * half)
        for (int64_t p = 0; p < half; p += HALF) {
            Bytes even[HALF], odd[HALF];
            for (int i = 0; i < HALF; i++) {
                const Bytes a = get(packed + (p + i) * ROWS), b = get(packed + (p + i) * ROWS + HALF);
                even[i] = SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
                odd[i] = SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            }
            transpose(even);
            transpose(odd);
            for (int r = 0; r < HALF; r++) {
                put(codes + r * half + p, up(even[r]) | low(odd[r]));
                put(codes + (r + HALF) * half + p, high(even[r]) | down(odd[r]));
            }
        }
}
