// Counter-based random numbers; see src/ops/sample/philox.rs.
#pragma once

#include "platform.cuh"

// Philox4x32-10 (Salmon et al. 2011): the first two words.
DEVICE void philox4x32(uint32_t (&counter)[4], uint32_t key_low, uint32_t key_high) {
    UNROLL
    for (int round = 0; round < 10; round++) {
        const uint32_t first_high = __umulhi(0xd2511f53u, counter[0]), first_low = 0xd2511f53u * counter[0];
        const uint32_t second_high = __umulhi(0xcd9e8d57u, counter[2]), second_low = 0xcd9e8d57u * counter[2];
        counter[0] = second_high ^ counter[1] ^ key_low;
        counter[1] = second_low;
        counter[2] = first_high ^ counter[3] ^ key_high;
        counter[3] = first_low;
        key_low += 0x9e3779b9u;
        key_high += 0xbb67ae85u;
    }
}

// The draw for the token at `position`, in (0, 1): the upper 52 of the first 64 bits and a half.
DEVICE double philox_uniform(uint32_t seed_low, uint32_t seed_high, uint32_t choice_index, uint32_t position) {
    uint32_t counter[4] = {position, choice_index, 0, 0};
    philox4x32(counter, seed_low, seed_high);
    const unsigned long long bits = (static_cast<unsigned long long>(counter[1]) << 32 | counter[0]) >> 12;
    return (static_cast<double>(bits) + 0.5) * (1.0 / 4503599627370496.0);
}
