// y = x W^T + bias, then an epilogue, for one row of x or thousands.
//
// Weights are the M side of the matrix instructions and tokens their N side, so few tokens waste nothing. A panel is 128
// output features over all input features, cut into stages of 16 KiB in the order in which fragments are read: one
// 16-byte load of a lane is its A fragment of a tile of 16 features (see `weight.cuh`). A thread block works on one panel
// and one tile of tokens; each warp on 32 features and up to 64 tokens (32 where weights are codes). Shared memory is a
// ring of stages that cp.async fills: weights, and the same input features of the tile's tokens (`tiles.cuh`). Finished
// sums lie there too, on their way to outputs (`sums.cuh`).
//
// Order of sums. The input features are cut into slices, by the weight's shape alone. A slice is one chain of matrix
// instructions in ascending order, started from zero; slices are added in ascending order, then bias and residual. Who
// computes a slice is free: with few tokens each has a thread block of its own (the last one to finish adds what all left
// in memory), with many one thread block goes through all of them with a second set of registers. A row has the same bits
// in either, at every place of every tile.
//
// | kernels           | x in the ring                                   | tokens of a tile   | warps |
// |-------------------|-------------------------------------------------|--------------------|-------|
// | linear_bf16_x8..  | f32 as it lies in memory, rounded when read     | 8, 16, 32          | 4     |
// | .._norm           | the same, times the norm's weights              | 8, 16, 32          | 4     |
// | linear_bf16_t64.. | fragments of bf16, made by linear_round_bf16    | 64, 128            | 4, 8  |
// | linear_int8_..    | fragments of int8, made by linear_round_int8    | 8, 32, 64          | 4, 8  |
// | linear_f32        | f32; plain multiplications, one chain, no slices | 16                 | 4     |
//
// A norm before the product. Numbers times the norm's weights are what is rounded, and the row's factor comes to its finished
// sums (for weights in groups, to the scales of x): so nobody reads a row before the product does. The factor is of sums of 32
// squares each, which the product before left behind when it added to the row.
//
// Weights in groups: products of whole numbers are exact within a group of 32 or 128 input features; the group's sum is
// scaled and added in f32, groups in ascending order.
//
// Bytes in flight. An H200 reads 4.3 TB/s with a latency of some 0.8 us under load: 3.4 MB must be on their way, 26 KB on
// each of 132 multiprocessors. A thread block has three stages of 16 KiB of weights on their way (two with 32 tokens), and
// shared memory holds two or three thread blocks (76 to 100 KiB each): 96 to 144 KiB. Where a shape gives one thread block
// for each multiprocessor it is 32 to 48 KiB. Thread blocks of an 8B model: 192 (qkv), 128 (o), 224 (gate and up), 128
// (down), all of them at work at once, and 1002 (vocabulary) in 2.5 rounds. What x adds to traffic from the level-2 cache:
// 4 bytes for each token against 256 of weights, so half as much again with 32 tokens (f32) and with 64 (bf16).
//
// After Marlin (Frantar et al. 2024) for weights in the order of fragments, and stream-K (Osama et al. 2023) for slices.

#include "sums.cuh"
#include "tiles.cuh"

namespace {

template <class Tile>
DEVICE Tile with_ring() {
    DYNAMIC_SHARED(ring);
    Tile tile;
    tile.ring = ring;
    return tile;
}

template <int TOKENS, bool HAS_NORM>
DEVICE void bf16_from_f32(const uint8_t* weights, const float* x, Output to, Job job) {
    auto tile = with_ring<Bf16FromF32<TOKENS, HAS_NORM>>();
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * STAGE_BYTES;
    tile.x = x;
    tile.norm_weight = to.norm.weight;
    tile.num_rows = to.num_rows;
    tile.in_features = to.norm.dim;
    run(job, to, tile);
}

template <int TOKENS>
DEVICE void bf16_from_fragments(const uint8_t* weights, const uint8_t* x, Output to, Job job) {
    auto tile = with_ring<Bf16FromFragments<TOKENS>>();
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * STAGE_BYTES;
    tile.x = x;
    tile.num_stages = job.num_stages;
    run(job, to, tile);
}

template <int TOKENS, Codes CODES>
DEVICE void grouped(const uint8_t* weights, const uint8_t* x, Output to, Job job, uint32_t flags) {
    auto tile = with_ring<Grouped<TOKENS, CODES>>();
    tile.has_min = CODES != Codes::INT8_LONG && (flags & WEIGHT_HAS_MIN) != 0;
    tile.has_table = CODES == Codes::INT4_SHORT && (flags & WEIGHT_HAS_TABLE) != 0;
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * tile.weight_bytes();
    tile.x = x;
    tile.num_stages = job.num_stages;
    run(job, to, tile);
}

}  // namespace

// Parameters of all products:
//   weights       packed, see weight.cuh
//   x             [num_rows, in_features] f32, or what a linear_round kernel made of it
//   out           [num_rows, out_features] f32, half as wide for SwiGLU
//   bias          [out_features] f32, or null
//   partials      sums of slices, where there are several in the grid
//   arrivals      a count for each panel and tile of tokens; zeros before and after
//   num_stages    of a panel; slice_stages of them are a slice
//   flags         what the weight is, see weight.cuh
//   epilogue      0 store, 1 add, 2 SwiGLU
//   norm_weight   [in_features] where x is normalised, else null; norm_squares are the sums of its squares, 32 numbers each, and
//                 norm_eps is added to their mean
//   squares       null, or where to leave such sums of what was stored or added
// Grid: tiles of tokens, panels, slices (or 1: one thread block goes through all of them).
#define PARAMETERS(X)                                                                                                  \
    const uint8_t* weights, const X* x, float* out, const float* bias, float* partials, uint32_t* arrivals,            \
        uint32_t num_rows, uint32_t in_features, uint32_t out_features, uint32_t num_stages, uint32_t slice_stages,    \
        uint32_t flags, uint32_t epilogue, const float* norm_weight, const float* norm_squares, float norm_eps,            \
        float* squares
#define NORM Norm{norm_weight, norm_squares, (in_features + SQUARES_FEATURES - 1) / SQUARES_FEATURES, in_features, norm_eps}
#define OUTPUT Output{out, bias, squares, num_rows, out_features, flags & WEIGHT_IS_GATE_UP, epilogue, NORM}
#define JOB Job{weights, num_stages, slice_stages, partials, arrivals}

KERNEL(linear_bf16_x8, (128), PARAMETERS(float)) {
    bf16_from_f32<8, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x8_norm, (128), PARAMETERS(float)) {
    bf16_from_f32<8, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x16, (128), PARAMETERS(float)) {
    bf16_from_f32<16, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x16_norm, (128), PARAMETERS(float)) {
    bf16_from_f32<16, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x32, (128), PARAMETERS(float)) {
    bf16_from_f32<32, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x32_norm, (128), PARAMETERS(float)) {
    bf16_from_f32<32, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_t64, (128), PARAMETERS(uint8_t)) {
    bf16_from_fragments<64>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_t128, (256), PARAMETERS(uint8_t)) {
    bf16_from_fragments<128>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_int8_long_t8, (128), PARAMETERS(uint8_t)) {
    grouped<8, Codes::INT8_LONG>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_long_t32, (128, 2), PARAMETERS(uint8_t)) {
    grouped<32, Codes::INT8_LONG>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_long_t64, (256), PARAMETERS(uint8_t)) {
    grouped<64, Codes::INT8_LONG>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t8, (128, 2), PARAMETERS(uint8_t)) {
    grouped<8, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t32, (128, 2), PARAMETERS(uint8_t)) {
    grouped<32, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t64, (256), PARAMETERS(uint8_t)) {
    grouped<64, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t8, (128), PARAMETERS(uint8_t)) {
    grouped<8, Codes::INT4_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t32, (128, 2), PARAMETERS(uint8_t)) {
    grouped<32, Codes::INT4_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t64, (256), PARAMETERS(uint8_t)) {
    grouped<64, Codes::INT4_SHORT>(weights, x, OUTPUT, JOB, flags);
}

// f32 weights: a thread block has 64 features and 16 tokens, a thread one feature and every second token. One chain over
// the input features; no slices.
KERNEL(linear_f32, (128), PARAMETERS(float)) {
    constexpr int TOKENS = 16;
    constexpr int FEATURES = 64;
    constexpr int K = 64;
    (void)partials;
    (void)arrivals;
    (void)num_stages;
    (void)slice_stages;
    (void)norm_weight;
    (void)norm_squares;
    (void)norm_eps;
    (void)squares;
    SHARED_ARRAY(float, x_numbers, K * TOKENS);
    const uint32_t lane = threadIdx.x % FEATURES;
    const uint32_t first = threadIdx.x / FEATURES * (TOKENS / 2);
    const uint32_t first_row = blockIdx.x * TOKENS;
    const float* panel = reinterpret_cast<const float*>(weights) + size_t(blockIdx.y) * in_features * FEATURES + lane;
    float sums[TOKENS / 2] = {};
    for (uint32_t stretch = 0; stretch < in_features; stretch += K) {
        const uint32_t len = min(uint32_t(K), in_features - stretch);
        __syncthreads();
        for (uint32_t index = threadIdx.x; index < TOKENS * K; index += 128) {
            const uint32_t row = first_row + index / K;
            const bool is_there = row < num_rows && index % K < len;
            x_numbers[index % K * TOKENS + index / K] = is_there ? x[size_t(row) * in_features + stretch + index % K] : 0.0f;
        }
        __syncthreads();
        UNROLL_BY(8)
        for (uint32_t k = 0; k < len; ++k) {
            const float weight = panel[size_t(stretch + k) * FEATURES];
            UNROLL
            for (int i = 0; i < TOKENS / 2; ++i) {
                sums[i] = fmaf(weight, x_numbers[k * TOKENS + first + i], sums[i]);
            }
        }
    }
    // Gates lie in even lanes, their ups in the next ones.
    const Output to = OUTPUT;
    const uint32_t cols = epilogue == SWIGLU ? out_features / 2 : out_features;
    const uint32_t feature = weight_feature_f32(out_features, to.is_gate_up, blockIdx.y, lane);
    const float own_bias = bias && feature != NO_FEATURE ? bias[feature] : 0.0f;
    UNROLL
    for (int i = 0; i < TOKENS / 2; ++i) {
        const uint32_t row = first_row + first + i;
        const float y = sums[i] + own_bias;
        const float up = __shfl_xor_sync(ALL_LANES, y, 1);
        if (row >= num_rows || feature == NO_FEATURE) {
            continue;
        }
        if (epilogue == SWIGLU) {
            if (lane % 2 == 0) {
                out[size_t(row) * cols + feature] = y / (1.0f + expf(-y)) * up;
            }
        } else {
            float* at = out + size_t(row) * cols + feature;
            *at = epilogue == ADD ? *at + y : y;
        }
    }
}

// x to the B fragments of m16n8k16: [tile of 16 tokens][16 input features][lane][two tiles of 8 tokens][2] pairs of bf16,
// zeros where there is no row or feature. A thread makes one lane's 16 bytes. norm_weight may be null.
KERNEL(linear_round_bf16, (256), const float* x, uint8_t* to, uint32_t num_rows, uint32_t in_features, uint32_t num_stages,
                      uint32_t num_units, const float* norm_weight) {
    const uint32_t unit = blockIdx.x * 256 + threadIdx.x;
    if (unit >= num_units) {
        return;
    }
    const uint32_t lane = unit % LANES;
    const uint32_t steps = num_stages * (BF16_STAGE_FEATURES / 16);
    const uint32_t step = unit / LANES % steps;
    const uint32_t tile = unit / LANES / steps;
    Bytes16 words;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t row = tile * 16 + i / 2 * 8 + lane / 4;
        const uint32_t feature = step * 16 + i % 2 * 8 + lane % 4 * 2;
        const float* from = x + size_t(row) * in_features + feature;
        const bool has_row = row < num_rows;
        float low = has_row && feature < in_features ? from[0] : 0.0f;
        float high = has_row && feature + 1 < in_features ? from[1] : 0.0f;
        if (norm_weight) {
            low *= feature < in_features ? norm_weight[feature] : 0.0f;
            high *= feature + 1 < in_features ? norm_weight[feature + 1] : 0.0f;
        }
        words.word[i] = floats_to_bf16_pair(low, high);
    }
    store_16(to + size_t(unit) * 16, words);
}

// x to the B fragments of m16n8k32, by groups: [tile of 16 tokens][stage of 128 input features]: codes [32 features][lane]
// [two tiles of 8 tokens][8], then for each group 16 scales and 16 sums of codes times their scale. A warp rounds a
// token's part of a stage.
KERNEL(linear_round_int8, (256), const float* x, uint8_t* to, uint32_t num_rows, uint32_t in_features, uint32_t num_stages,
                      uint32_t group_len, uint32_t num_units, const float* norm_weight, const float* norm_squares,
                      float norm_eps) {
    const uint32_t unit = blockIdx.x * 8 + threadIdx.x / LANES;
    if (unit >= num_units) {
        return;
    }
    const uint32_t lane = threadIdx.x % LANES;
    const uint32_t stage = unit % num_stages;
    const uint32_t row = unit / num_stages;
    float numbers[4];
    float largest = 0.0f;
    float poison = 0.0f;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t feature = stage * INT8_STAGE_FEATURES + lane * 4 + i;
        const bool is_there = row < num_rows && feature < in_features;
        numbers[i] = is_there ? x[size_t(row) * in_features + feature] : 0.0f;
        if (norm_weight && is_there) {
            numbers[i] *= norm_weight[feature];
        }
        const float magnitude = fabsf(numbers[i]);
        largest = magnitude > largest ? magnitude : largest;
        // NaN where the number is not finite.
        poison += numbers[i] * 0.0f;
    }
    const int lanes_of_group = group_len / 4;
    for (int apart = 1; apart < lanes_of_group; apart *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
        poison += __shfl_xor_sync(ALL_LANES, poison, apart);
    }
    const bool is_zero = largest < 1e-30f;
    const float factor = is_zero ? 0.0f : 127.0f / largest;
    int32_t sum = 0;
    uint32_t word = 0;
    UNROLL
    for (int i = 0; i < 4; ++i) {
        const float scaled = numbers[i] * factor;
        // Nothing that is not finite is turned into a whole number.
        const int32_t code = poison == 0.0f ? __float2int_rn(scaled) : 0;
        sum += code;
        word |= (uint32_t(code) & 0xffu) << (8 * i);
    }
    for (int apart = 1; apart < lanes_of_group; apart *= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, apart);
    }
    const float row_factor = norm_weight && row < num_rows ? norm_factor(NORM, row) : 1.0f;
    const float scale = (is_zero ? 0.0f : largest / 127.0f) * row_factor + poison;
    const uint32_t groups = INT8_STAGE_FEATURES / group_len;
    const size_t bytes = 16 * INT8_STAGE_FEATURES + groups * 128;
    uint8_t* tile = to + (size_t(row / 16) * num_stages + stage) * bytes;
    const uint32_t step = lane / 8;
    const uint32_t target_lane = row % 8 * 4 + lane % 4;
    const uint32_t at = (step * LANES + target_lane) * 16 + row % 16 / 8 * 8 + lane % 8 / 4 * 4;
    *reinterpret_cast<uint32_t*>(tile + at) = word;
    if (lane % lanes_of_group == 0) {
        float* scales = reinterpret_cast<float*>(tile + 16 * INT8_STAGE_FEATURES + lane / lanes_of_group * 128);
        scales[row % 16] = scale;
        scales[16 + row % 16] = scale * float(sum);
    }
}
