// Numbers as whole numbers of the same order.
#pragma once

#include "platform.cuh"

// Ascending order of numbers; the two zeros are one, NaN is with the least.
DEVICE uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x != x ? -INFINITY : x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The number again.
DEVICE float of_ordered(uint32_t key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }
