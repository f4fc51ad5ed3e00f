// What a card can do at most. A grid is a few blocks for each multiprocessor; the blocks of `peaks_read` share the memory in
// turns of a block's width, all others compute on registers alone. What is computed is stored only where it is a number that
// it never is: the compiler must not leave it out.

#include "memory.cuh"
#include "mma.cuh"
#include "platform.cuh"

constexpr int THREADS = 256;
// Chains that do not wait for each other.
constexpr int CHAINS = 8;

// Reads num_vectors vectors of 16 bytes.
KERNEL(peaks_read, (THREADS), const uint8_t* from, uint64_t num_vectors, uint32_t* out) {
    const uint64_t stride = uint64_t(gridDim.x) * THREADS;
    uint32_t sum = 0;
    uint64_t at = uint64_t(blockIdx.x) * THREADS + threadIdx.x;
    for (; at + 3 * stride < num_vectors; at += 4 * stride) {
        Bytes16 v[4];
        UNROLL
        for (int i = 0; i < 4; ++i) v[i] = load_16_streaming(from + 16 * (at + i * stride));
        UNROLL
        for (int i = 0; i < 4; ++i) sum += v[i].word[0] ^ v[i].word[1] ^ v[i].word[2] ^ v[i].word[3];
    }
    for (; at < num_vectors; at += stride) {
        const Bytes16 v = load_16_streaming(from + 16 * at);
        sum += v.word[0] ^ v.word[1] ^ v.word[2] ^ v.word[3];
    }
    if (sum == 0x9e3779b9u) out[0] = sum;
}

// A warp does rounds * CHAINS products of 16 x 16 by 16 x 8.
KERNEL(peaks_bf16, (THREADS), uint32_t rounds, float* out) {
    float sums[CHAINS][4] = {};
    const uint32_t a[4] = {threadIdx.x, threadIdx.x, threadIdx.x, threadIdx.x};
    const uint32_t b[2] = {threadIdx.x, threadIdx.x};
    for (uint32_t round = 0; round < rounds; ++round) {
        UNROLL
        for (int chain = 0; chain < CHAINS; ++chain) mma_m16n8k16_bf16(sums[chain], a, b);
    }
    float sum = 0.0f;
    for (int chain = 0; chain < CHAINS; ++chain) sum += sums[chain][0] + sums[chain][1] + sums[chain][2] + sums[chain][3];
    if (sum == 12345.678f) out[0] = sum;
}

// A warp does rounds * CHAINS products of 16 x 32 by 32 x 8.
KERNEL(peaks_int8, (THREADS), uint32_t rounds, uint32_t* out) {
    int sums[CHAINS][4] = {};
    const uint32_t a[4] = {threadIdx.x, threadIdx.x, threadIdx.x, threadIdx.x};
    const uint32_t b[2] = {threadIdx.x, threadIdx.x};
    for (uint32_t round = 0; round < rounds; ++round) {
        UNROLL
        for (int chain = 0; chain < CHAINS; ++chain) mma_m16n8k32_int8(sums[chain], a, b);
    }
    uint32_t sum = 0;
    for (int chain = 0; chain < CHAINS; ++chain) {
        for (int i = 0; i < 4; ++i) sum += uint32_t(sums[chain][i]);
    }
    if (sum == 0x9e3779b9u) out[0] = sum;
}

// A thread does rounds * CHAINS products and sums.
KERNEL(peaks_f32, (THREADS), uint32_t rounds, float* out) {
    float sums[CHAINS] = {};
    const float x = float(threadIdx.x) * 1e-3f, y = 0.999f;
    for (uint32_t round = 0; round < rounds; ++round) {
        UNROLL
        for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = fmaf(sums[chain], y, x);
    }
    float sum = 0.0f;
    for (int chain = 0; chain < CHAINS; ++chain) sum += sums[chain];
    if (sum == 12345.678f) out[0] = sum;
}
