/* What the templates call, with 8 float32 a vector: two registers of NEON, so that the bits are AVX2's. `simd_end.h`
 * forgets the macros. */
#ifndef OFFLOAD_SIMD_NEON_H
#define OFFLOAD_SIMD_NEON_H

#include "numbers.h"

typedef struct {
    float32x4_t a, b;
} Floats;

/* The same number of 32-bit integers. */
typedef struct {
    int32x4_t a, b;
} Integers;

#define BOTH(Type, name, function)                                                                                     \
    ALWAYS Type name##_neon(Type x, Type y) { return (Type){function(x.a, y.a), function(x.b, y.b)}; }
BOTH(Floats, add, vaddq_f32)
BOTH(Floats, sub, vsubq_f32)
BOTH(Floats, mul, vmulq_f32)
BOTH(Floats, div, vdivq_f32)
BOTH(Floats, hadd, vpaddq_f32)
BOTH(Integers, integer_add, vaddq_s32)
#undef BOTH

ALWAYS Floats spread_neon(float value) { return (Floats){vdupq_n_f32(value), vdupq_n_f32(value)}; }
ALWAYS Floats load_neon(const float *at) { return (Floats){vld1q_f32(at), vld1q_f32(at + 4)}; }
ALWAYS void store_neon(float *at, Floats v) { vst1q_f32(at, v.a), vst1q_f32(at + 4, v.b); }
ALWAYS Floats fma_neon(Floats x, Floats y, Floats z) {
    return (Floats){vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)};
}
ALWAYS Floats sqrt_neon(Floats v) { return (Floats){vsqrtq_f32(v.a), vsqrtq_f32(v.b)}; }
ALWAYS Floats nearest_neon(Floats v) { return (Floats){vrndnq_f32(v.a), vrndnq_f32(v.b)}; }

/* The second where one is no number, as with AVX2. */
ALWAYS Floats min_neon(Floats x, Floats y) {
    return (Floats){vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
}
ALWAYS Floats max_neon(Floats x, Floats y) {
    return (Floats){vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
}

/* Numbers made of bits. */
ALWAYS Floats of_bits_neon(uint32x4_t a, uint32x4_t b) {
    return (Floats){vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b)};
}
ALWAYS Floats of_signed_neon(int16x8_t v) {
    return (Floats){vcvtq_f32_s32(vmovl_s16(vget_low_s16(v))), vcvtq_f32_s32(vmovl_high_s16(v))};
}

ALWAYS Floats bf16_even_neon(const void *at) {
    return of_bits_neon(vshlq_n_u32(vld1q_u32(at), 16), vshlq_n_u32(vld1q_u32((const uint32_t *)at + 4), 16));
}
ALWAYS Floats bf16_odd_neon(const void *at) {
    const uint32x4_t upper = vdupq_n_u32(0xFFFF0000);
    return of_bits_neon(vandq_u32(vld1q_u32(at), upper), vandq_u32(vld1q_u32((const uint32_t *)at + 4), upper));
}
ALWAYS Floats from_bf16_neon(const void *at) {
    const uint16x8_t v = vld1q_u16(at);
    return of_bits_neon(vshll_n_u16(vget_low_u16(v), 16), vshll_high_n_u16(v, 16));
}
ALWAYS Floats from_fp16_neon(const void *at) {
    const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(at));
    return (Floats){vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
}
ALWAYS Floats from_int8_neon(const void *at) { return of_signed_neon(vmovl_s8(vld1_s8(at))); }
ALWAYS Floats from_low_neon(const void *at) {
    return of_signed_neon(vreinterpretq_s16_u16(vmovl_u8(vand_u8(vld1_u8(at), vdup_n_u8(15)))));
}
ALWAYS Floats from_high_neon(const void *at) {
    return of_signed_neon(vreinterpretq_s16_u16(vmovl_u8(vshr_n_u8(vld1_u8(at), 4))));
}

/* The nearest bfloat16, even where two are as near, in the lower halves of words; what is no number stays none. */
ALWAYS uint32x4_t rounded_neon(float32x4_t v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vbslq_u32(vceqq_f32(v, v), vshrq_n_u32(up, 16), vdupq_n_u32(0x7FC0));
}
ALWAYS Floats once_rounded_neon(Floats v) {
    return of_bits_neon(vshlq_n_u32(rounded_neon(v.a), 16), vshlq_n_u32(rounded_neon(v.b), 16));
}
ALWAYS void put_bf16_neon(uint16_t *at, Floats v) {
    vst1q_u16(at, vcombine_u16(vmovn_u32(rounded_neon(v.a)), vmovn_u32(rounded_neon(v.b))));
}

ALWAYS uint32x4_t power_of_2_neon(float32x4_t n) {
    return vreinterpretq_u32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
}
ALWAYS Floats unless_neon(Floats v, Floats value, Floats then) {
    return of_bits_neon(vbicq_u32(vreinterpretq_u32_f32(then.a), vceqq_f32(v.a, value.a)),
                        vbicq_u32(vreinterpretq_u32_f32(then.b), vceqq_f32(v.b, value.b)));
}

ALWAYS Floats sums_of_neon(const Floats *v) {
    const Floats a = hadd_neon(hadd_neon(v[0], v[1]), hadd_neon(v[2], v[3]));
    const Floats b = hadd_neon(hadd_neon(v[4], v[5]), hadd_neon(v[6], v[7]));
    return (Floats){vaddq_f32(a.a, a.b), vaddq_f32(b.a, b.b)};
}

#endif

#define LANES 8
#define NAME(name) name##_neon
#define TARGET TARGET_LEAST
#define F Floats
#define ZERO() spread_neon(0)
#define LOAD(at) load_neon(at)
#define STORE(at, v) store_neon(at, v)
#define SPREAD(value) spread_neon(value)
#define ADD(a, b) add_neon(a, b)
#define SUB(a, b) sub_neon(a, b)
#define MUL(a, b) mul_neon(a, b)
#define FMA(a, b, c) fma_neon(a, b, c)
#define BF16_EVEN(at) bf16_even_neon(at)
#define BF16_ODD(at) bf16_odd_neon(at)
#define FROM_BF16(at) from_bf16_neon(at)
#define FROM_FP16(at) from_fp16_neon(at)
#define FROM_INT8(at) from_int8_neon(at)
#define FROM_LOW(at) from_low_neon(at)
#define FROM_HIGH(at) from_high_neon(at)

#define V Integers
#define INTEGER_ZERO() ((Integers){vdupq_n_s32(0), vdupq_n_s32(0)})
#define INTEGER_ADD(a, b) integer_add_neon(a, b)
#define TO_FLOAT(v) ((Floats){vcvtq_f32_s32((v).a), vcvtq_f32_s32((v).b)})

#define DIV(a, b) div_neon(a, b)
#define SQRT(v) sqrt_neon(v)
#define MIN(a, b) min_neon(a, b)
#define MAX(a, b) max_neon(a, b)
#define NEAREST(v) nearest_neon(v)
#define POWER_OF_2(n) of_bits_neon(power_of_2_neon((n).a), power_of_2_neon((n).b))
#define UNLESS(v, value, then) unless_neon(v, value, then)
#define ONCE_ROUNDED(v) once_rounded_neon(v)
#define PUT_BF16(at, v) put_bf16_neon(at, v)
#define PUT_SUMS(at, v) store_neon(at, sums_of_neon(v))
