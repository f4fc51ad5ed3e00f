// Numbers of 16 and 8 bits, as their bits.
#pragma once

#include "platform.cuh"

DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
// Of a pair, low half first.
DEVICE float bf16_low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The nearest, half to even; a NaN stays one.
DEVICE uint16_t float_to_bf16(float x) {
#ifdef __CUDACC__
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#else
    const uint32_t bits = __float_as_uint(x);
    // What the device makes of every NaN.
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

DEVICE uint32_t floats_to_bf16_pair(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return static_cast<uint32_t>(float_to_bf16(high)) << 16 | float_to_bf16(low);
#endif
}

// Of f16.
DEVICE float half_to_float(uint32_t bits) {
#ifdef __CUDACC__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
    return x;
#else
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    // Exponent and fraction moved to their places; the product corrects the bias, also of the smallest numbers.
    const float magnitude = rest >= 0x7c00u ? __uint_as_float(0x7f800000u | rest << 13)
                                            : __uint_as_float(rest << 13) * __uint_as_float((127u + 112u) << 23);
    return __uint_as_float(__float_as_uint(magnitude) | sign);
#endif
}

// e4m3 (OCP FP8, no infinities, magnitudes up to 448): whole arithmetic, the same on every device.
DEVICE float e4m3_to_float(uint8_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24, rest = bits & 0x7f;
    if (rest == 0x7f) return __uint_as_float(sign | 0x7fc00000u);
    // Three bits of fraction and a bias of 7 moved to 23 and 127; the product is exact for the small ones, too.
    return __uint_as_float(sign | rest << 20) * __uint_as_float((127u + 120u) << 23);
}

// The codes in bytes 1 and 3 of a word, whatever is in the others, as a pair of bf16: bits moved to their places, and a product
// that corrects the exponent, all exact. Codes that are no numbers become some.
DEVICE uint32_t e4m3_to_bf16_pair(uint32_t codes) {
    const uint32_t bits = (codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u);
#ifdef __CUDACC__
    uint32_t values;
    // Times 2^120, plus minus zero: zeros keep their signs.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(values) : "r"(bits), "r"(0x7b807b80u), "r"(0x80008000u));
    return values;
#else
    const float factor = __uint_as_float((127u + 120u) << 23);
    return floats_to_bf16_pair(bf16_low(bits) * factor, bf16_high(bits) * factor);
#endif
}

// The nearest, half to even; what is larger than the largest becomes that; a NaN stays one.
DEVICE uint8_t float_to_e4m3(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
    const float magnitude = __uint_as_float(bits & 0x7fffffffu);
    if (x != x) return static_cast<uint8_t>(sign | 0x7f);
    if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7e);
    if (magnitude < 0.015625f) {
        // In steps of 2^-9; a sum with 1.5 * 2^23 leaves the nearest whole number in the low bits.
        const uint32_t steps = __float_as_uint(magnitude * 512.0f + 12582912.0f) & 0xff;
        return static_cast<uint8_t>(sign | steps);
    }
    const uint32_t rounded = (bits & 0x7fffffffu) + 0x7ffffu + (bits >> 20 & 1);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

// The nearest whole number, half to even; for magnitudes up to 127.
DEVICE int8_t float_to_int8(float x) { return static_cast<int8_t>(__float2int_rn(x)); }

// Byte `index` of a word, as signed.
DEVICE int signed_byte(uint32_t word, unsigned index) { return static_cast<int8_t>(word >> (8 * index)); }
