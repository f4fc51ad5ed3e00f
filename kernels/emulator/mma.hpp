// The instructions of the tensor cores, for the host.
//
// Products are exact. Sums of bf16 products are f32, rounded after each addition, from the accumulator on in ascending
// order of k; a device adds them in an order and with a rounding of its own, so its last bits differ. Sums of whole
// numbers are exact and wrap.
#pragma once

#include "emulator.hpp"

namespace emulator {

inline float bf16_half(unsigned pair, unsigned half) {
    return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u);
}

// d = a * b + d: a is 16 x 16 by rows, b 16 x 8 by columns.
struct MmaBf16 {
    const unsigned* a;
    const unsigned* b;
    float* d;

    __attribute__((no_sanitize("thread"))) static void perform(void* const lanes[32], uint32_t) {
        float a[16][16], b[16][8], d[16][8];
        for (unsigned lane = 0; lane < 32; lane++) {
            const auto& own = *static_cast<MmaBf16*>(lanes[lane]);
            const unsigned group = lane / 4, pair = lane % 4 * 2;
            for (unsigned half = 0; half < 2; half++) {
                for (unsigned part = 0; part < 4; part++) {
                    a[group + part % 2 * 8][pair + part / 2 * 8 + half] = bf16_half(own.a[part], half);
                }
                for (unsigned part = 0; part < 2; part++) b[pair + part * 8 + half][group] = bf16_half(own.b[part], half);
                for (unsigned part = 0; part < 2; part++) d[group + part * 8][pair + half] = own.d[2 * part + half];
            }
        }
        for (unsigned row = 0; row < 16; row++) {
            for (unsigned k = 0; k < 16; k++) {
                for (unsigned col = 0; col < 8; col++) d[row][col] += a[row][k] * b[k][col];
            }
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            auto& own = *static_cast<MmaBf16*>(lanes[lane]);
            for (unsigned part = 0; part < 4; part++) own.d[part] = d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2];
        }
    }
};

// d = a * b + d: a is 16 x 32 bytes by rows, b 32 x 8 bytes by columns.
struct MmaInt8 {
    const unsigned* a;
    const unsigned* b;
    int* d;

    __attribute__((no_sanitize("thread"))) static void perform(void* const lanes[32], uint32_t) {
        int a[16][32], b[32][8];
        unsigned d[16][8];
        for (unsigned lane = 0; lane < 32; lane++) {
            const auto& own = *static_cast<MmaInt8*>(lanes[lane]);
            const unsigned group = lane / 4, four = lane % 4 * 4;
            for (unsigned byte = 0; byte < 4; byte++) {
                for (unsigned part = 0; part < 4; part++) {
                    a[group + part % 2 * 8][four + part / 2 * 16 + byte] = static_cast<int8_t>(own.a[part] >> (8 * byte));
                }
                for (unsigned part = 0; part < 2; part++) {
                    b[four + part * 16 + byte][group] = static_cast<int8_t>(own.b[part] >> (8 * byte));
                }
            }
            for (unsigned part = 0; part < 4; part++) {
                d[group + part / 2 * 8][lane % 4 * 2 + part % 2] = static_cast<unsigned>(own.d[part]);
            }
        }
        for (unsigned row = 0; row < 16; row++) {
            for (unsigned k = 0; k < 32; k++) {
                for (unsigned col = 0; col < 8; col++) d[row][col] += static_cast<unsigned>(a[row][k] * b[k][col]);
            }
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            auto& own = *static_cast<MmaInt8*>(lanes[lane]);
            for (unsigned part = 0; part < 4; part++) {
                own.d[part] = static_cast<int>(d[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2]);
            }
        }
    }
};

// `count` matrices of 8 x 8 pairs of bytes: lanes 8i to 8i + 7 say where the rows of matrix i lie.
template <unsigned count, bool transposed> struct LoadMatrix {
    const void* row;
    unsigned* out;

    __attribute__((no_sanitize("thread"))) static void perform(void* const lanes[32], uint32_t) {
        for (unsigned matrix = 0; matrix < count; matrix++) {
            uint16_t of[8][8];
            for (unsigned row = 0; row < 8; row++) {
                memcpy(of[row], static_cast<LoadMatrix*>(lanes[8 * matrix + row])->row, 16);
            }
            for (unsigned lane = 0; lane < 32; lane++) {
                const unsigned row = lane / 4, col = lane % 4 * 2;
                const unsigned low = transposed ? of[col][row] : of[row][col];
                const unsigned high = transposed ? of[col + 1][row] : of[row][col + 1];
                static_cast<LoadMatrix*>(lanes[lane])->out[matrix] = high << 16 | low;
            }
        }
    }
};

template <unsigned count, bool transposed>
__attribute__((no_sanitize("thread"))) inline void load_matrix(unsigned (&out)[count], const void* row) {
    if (lane() < 8 * count) {
        require_aligned(row, 16);
        if (!is_shared(row)) fail("loads a matrix from what is not shared memory");
        touch(row, 16, Touch::Read);
    }
    LoadMatrix<count, transposed> operands = {row, out};
    together(0xffffffff, &LoadMatrix<count, transposed>::perform, &operands);
}

}  // namespace emulator
