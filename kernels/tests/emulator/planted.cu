// Kernels with one fault each, and twins without: what the emulator must find, and must not.

#include "async_copy.cuh"
#include "barrier.cuh"
#include "exp2.cuh"
#include "fault.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "warp.cuh"

// Every warp reads what the others wrote; the barrier between is left out on request, or comes before the next write.
KERNEL(rotate, (256), const float* x, float* out, uint32_t has_first_barrier, uint32_t has_second_barrier) {
    SHARED_ARRAY(float, row, 256);
    for (unsigned round = 0; round < 2; round++) {
        row[threadIdx.x] = x[threadIdx.x] + static_cast<float>(round);
        if (has_first_barrier) __syncthreads();
        out[round * 256 + threadIdx.x] = row[(threadIdx.x + 32) % 256];
        if (has_second_barrier) __syncthreads();
    }
}

// Lanes of one warp hand on numbers through shared memory, which takes a barrier of the warp.
KERNEL(lanes, (32), float* out, uint32_t has_barrier) {
    SHARED_ARRAY(float, row, 32);
    row[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (has_barrier) __syncwarp();
    out[threadIdx.x] = row[31 - threadIdx.x];
}

// All threads write one number.
KERNEL(write_both, (64), float* out, uint32_t is_atomic) {
    SHARED_ARRAY(uint32_t, count, 1);
    if (threadIdx.x == 0) count[0] = 0;
    __syncthreads();
    if (is_atomic) atomicAdd(&count[0], 1u);
    else count[0] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = static_cast<float>(count[0]);
}

// Numbers that go through a buffer from thread to thread of a block.
KERNEL(through_buffer, (64), float* out, uint32_t has_barrier) {
    out[threadIdx.x] = static_cast<float>(threadIdx.x);
    if (has_barrier) __syncthreads();
    out[64 + threadIdx.x] = out[63 - threadIdx.x];
}

// A barrier that only some threads reach.
KERNEL(diverge, (128), uint32_t first_outside) {
    if (threadIdx.x < first_outside) __syncthreads();
}

// A barrier that some threads never come to, since they wait for lanes that ended.
KERNEL(lonely, (32), float* out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = warp_sum(1.0f);
}

KERNEL(touch_at, (32), float* out, int32_t at, uint32_t is_read) {
    if (threadIdx.x != 0) return;
    if (is_read) out[0] = out[at];
    else out[at] = 1.0f;
}

KERNEL(touch_shared_at, (32), float* out, uint32_t at) {
    DYNAMIC_SHARED(shared);
    float* numbers = reinterpret_cast<float*>(shared);
    if (threadIdx.x == 0) numbers[at] = 1.0f;
    __syncwarp();
    out[threadIdx.x] = numbers[threadIdx.x % 2];
}

// Copies to shared memory and back. `steps`: bit 0 waits, bit 1 has a barrier.
KERNEL(copy, (64), const float* x, float* out, uint32_t steps) {
    SHARED_ARRAY(Bytes16, row, 64);
    copy_async_16(&row[threadIdx.x], x + 4 * threadIdx.x);
    commit_copies();
    if (steps & 1) wait_copies<0>();
    if (steps & 2) __syncthreads();
    store_16(out + 4 * threadIdx.x, row[63 - threadIdx.x]);
}

// Two stages in flight: 8 tiles of 32 x 16 bytes are summed, each waited for when one more is on its way.
KERNEL(pipeline, (32), const float* x, float* out) {
    SHARED_ARRAY(Bytes16, stages, 2 * 32);
    const unsigned lane = lane_index();
    float sum[4] = {};
    copy_async_16(&stages[lane], x + 4 * lane);
    commit_copies();
    for (unsigned tile = 0; tile < 8; tile++) {
        if (tile + 1 < 8) copy_async_16(&stages[(tile + 1) % 2 * 32 + lane], x + ((tile + 1) * 32 + lane) * 4);
        commit_copies();
        wait_copies<1>();
        const Bytes16 v = stages[tile % 2 * 32 + lane];
        for (unsigned i = 0; i < 4; i++) sum[i] += __uint_as_float(v.word[i]);
    }
    for (unsigned i = 0; i < 4; i++) out[4 * lane + i] = sum[i];
}

// Warps 0 and 1 write, 2 and 3 read, over named barriers: those that write only arrive.
KERNEL(hand_over, (128), float* out, uint32_t has_barrier) {
    SHARED_ARRAY(float, row, 64);
    if (threadIdx.x < 64) {
        row[threadIdx.x] = static_cast<float>(threadIdx.x);
        if (has_barrier) arrive_threads(1, 128);
    } else {
        if (has_barrier) sync_threads(1, 128);
        out[threadIdx.x - 64] = row[127 - threadIdx.x];
    }
}

// Waits for a flag that another warp sets, or that nobody does.
KERNEL(flag, (64), uint32_t* flags, uint32_t is_set) {
    if (threadIdx.x == 0) {
        wait_for_flag(&flags[0], 1);
        flags[1] = 7;
    }
    if (threadIdx.x == 32 && is_set) store_release(&flags[0], 1);
}

// [16, 16] times [16, 8] transposed, through shared memory: `b` is [8, 16].
KERNEL(product_bf16, (32), const uint16_t* a, const uint16_t* b, float* out) {
    SHARED_ARRAY(Bytes16, rows, 3 * 16);
    auto* a_rows = reinterpret_cast<uint16_t*>(rows);
    uint16_t* b_rows = a_rows + 256;
    const unsigned lane = lane_index();
    for (unsigned i = lane; i < 256; i += 32) a_rows[i] = a[i];
    for (unsigned i = lane; i < 128; i += 32) b_rows[i] = b[i];
    __syncwarp();
    uint32_t a_part[4], b_part[2];
    load_matrix_x4(a_part, a_rows + lane % 16 * 16 + lane / 16 * 8);
    load_matrix_x2(b_part, b_rows + lane % 8 * 16 + lane / 8 % 2 * 8);
    float d[4] = {};
    mma_m16n8k16_bf16(d, a_part, b_part);
    for (unsigned i = 0; i < 4; i++) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// The same of whole numbers: [16, 32] times [8, 32] transposed; fragments are read without shared memory.
KERNEL(product_int8, (32), const uint32_t* a, const uint32_t* b, int32_t* out) {
    const unsigned group = lane_index() / 4, four = lane_index() % 4;
    const uint32_t a_part[4] = {a[group * 8 + four], a[(group + 8) * 8 + four], a[group * 8 + four + 4],
                                a[(group + 8) * 8 + four + 4]};
    const uint32_t b_part[2] = {b[group * 8 + four], b[group * 8 + four + 4]};
    int d[4] = {};
    mma_m16n8k32_int8(d, a_part, b_part);
    for (unsigned i = 0; i < 4; i++) out[(group + i / 2 * 8) * 8 + four * 2 + i % 2] = d[i];
}

// A matrix of 8 x 8 through ldmatrix, transposed.
KERNEL(transpose, (32), const uint16_t* x, uint32_t* out) {
    SHARED_ARRAY(Bytes16, rows, 8);
    auto* numbers = reinterpret_cast<uint16_t*>(rows);
    for (unsigned i = lane_index(); i < 64; i += 32) numbers[i] = x[i];
    __syncwarp();
    uint32_t part[1];
    load_matrix_x1_transposed(part, numbers + lane_index() % 8 * 8);
    out[lane_index()] = part[0];
}

// Conversions and sums: one number per thread to eight.
KERNEL(convert, (64), const float* x, uint32_t* out, uint32_t* record) {
    SHARED_ARRAY(float, of_warps, 2);
    const float own = x[threadIdx.x];
    uint32_t* row = out + 8 * threadIdx.x;
    row[0] = float_to_bf16(own);
    row[1] = floats_to_bf16_pair(own, -own);
    row[2] = float_to_e4m3(own);
    row[3] = __float_as_uint(e4m3_to_float(float_to_e4m3(own)));
    row[4] = __float_as_uint(exp2_exact(own));
    row[5] = __float_as_uint(block_sum(own, of_warps));
    row[6] = __float_as_uint(block_max(own, of_warps));
    row[7] = __float_as_uint(warp_running_sum(own));
    if (own != own) report_fault(record, threadIdx.x, 64);
}
