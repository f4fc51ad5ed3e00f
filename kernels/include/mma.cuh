// The tensor cores, one function per instruction. All lanes of the warp take part.
//
// Of a 16 x 8 result d, lane l holds rows l / 4 (d[0], d[1]) and l / 4 + 8 (d[2], d[3]), columns l % 4 * 2 and the next.
#pragma once

#include "platform.cuh"

#ifndef __CUDACC__
#include "mma.hpp"
#endif

// `row` is a row of 16 bytes of shared memory on a multiple of 16: lanes 8i to 8i + 7 name those of matrix i. out[i] gets the
// numbers of row l / 4 of matrix i, columns l % 4 * 2 (low half) and the next; transposed: of that column, those rows.
#ifdef __CUDACC__
DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

DEVICE void load_matrix_x1(uint32_t (&out)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(out[0]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrix_x2(uint32_t (&out)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x1_transposed(uint32_t (&out)[1], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(out[0])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x2_transposed(uint32_t (&out)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(out[0]), "=r"(out[1])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#else
DEVICE void load_matrix_x1(uint32_t (&out)[1], const void* row) { emulator::load_matrix<1, false>(out, row); }
DEVICE void load_matrix_x2(uint32_t (&out)[2], const void* row) { emulator::load_matrix<2, false>(out, row); }
DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) { emulator::load_matrix<4, false>(out, row); }
DEVICE void load_matrix_x1_transposed(uint32_t (&out)[1], const void* row) { emulator::load_matrix<1, true>(out, row); }
DEVICE void load_matrix_x2_transposed(uint32_t (&out)[2], const void* row) { emulator::load_matrix<2, true>(out, row); }
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row) { emulator::load_matrix<4, true>(out, row); }
#endif

// d += a * b, a 16 x 16 bf16 by rows, b 16 x 8 bf16 by columns, sums in f32. Pairs, low half first: a[0] row l / 4, columns
// l % 4 * 2 and the next; a[1] row + 8; a[2] column + 8; a[3] both. b[0] rows l % 4 * 2 and the next of column l / 4; b[1]
// rows + 8.
DEVICE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::MmaBf16 operands = {a, b, d};
    emulator::together(0xffffffff, &emulator::MmaBf16::perform, &operands);
#endif
}

// d += a * b, a 16 x 32 signed bytes by rows, b 32 x 8 by columns, sums in i32. Four bytes, lowest first: a[0] row l / 4,
// columns l % 4 * 4 on; a[1] row + 8; a[2] column + 16; a[3] both. b[0] rows l % 4 * 4 on of column l / 4; b[1] rows + 16.
DEVICE void mma_m16n8k32_int8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulator::MmaInt8 operands = {a, b, d};
    emulator::together(0xffffffff, &emulator::MmaInt8::perform, &operands);
#endif
}
