/* The kinds of numbers that matrices consist of, and one number of them at a time. */
#ifndef OFFLOAD_NUMBERS_H
#define OFFLOAD_NUMBERS_H

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
/* What the processor has at the least, where a kernel runs at all. */
#define TARGET_LEAST __attribute__((target("avx2,fma,f16c")))
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET_LEAST
#else
#error "there are kernels for x86-64 and for aarch64"
#endif

#define ALWAYS static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* What lies at `at` is wanted soon: in the second cache, which has more requests under way than the first. */
#define FETCH(at) __builtin_prefetch(at, 0, 2)
/* The same, and not again for long: it should not drive out of the caches what Python needs between two calls. */
#define FETCH_ONCE(at) __builtin_prefetch(at, 0, 0)

enum { FLOAT32, BFLOAT16, FLOAT16, INT8, NESTED4, NESTED8, NESTED3 };

static inline int64_t size_of(int kind) { return kind == FLOAT32 ? 4 : kind == INT8 ? 1 : 2; }

static inline float from_bf16(uint16_t bits) {
    union { uint32_t bits; float value; } both = {(uint32_t)bits << 16};
    return both.value;
}

/* Nearest even; what is no number stays none. */
static inline uint16_t to_bf16(float value) {
    union { float value; uint32_t bits; } both = {value};
    if (value != value)
        return 0x7FC0;
    return (uint16_t)((both.bits + 0x7FFF + (both.bits >> 16 & 1)) >> 16);
}

#ifdef __x86_64__
TARGET_LEAST static inline float from_fp16(uint16_t bits) { return _cvtsh_ss(bits); }

TARGET_LEAST static inline uint16_t to_fp16(float value) {
    return (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
}
#else
typedef union { uint16_t bits; __fp16 value; } Fp16;

static inline float from_fp16(uint16_t bits) { return ((Fp16){.bits = bits}).value; }
static inline uint16_t to_fp16(float value) { return ((Fp16){.value = (__fp16)value}).bits; }
#endif

/* `count` numbers of `kind`, float32, bfloat16 or float16, as float32. */
TARGET_LEAST static inline void widen_numbers(const void *values, int kind, int count, float *out) {
    for (int i = 0; i < count; i++)
        out[i] = kind == FLOAT32    ? ((const float *)values)[i]
                 : kind == BFLOAT16 ? from_bf16(((const uint16_t *)values)[i])
                                    : from_fp16(((const uint16_t *)values)[i]);
}

/* `count` float32 as numbers of `kind`: float32, bfloat16 or float16. */
static inline void narrow(const float *values, int kind, void *out, int count) {
    for (int i = 0; i < count; i++)
        if (kind == FLOAT32)
            ((float *)out)[i] = values[i];
        else
            ((uint16_t *)out)[i] = kind == BFLOAT16 ? to_bf16(values[i]) : to_fp16(values[i]);
}

#endif
