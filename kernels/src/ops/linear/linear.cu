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
// | linear_bf16_t64.. | fragments of bf16, made in the same launch      | 64, 128            | 4, 8  |
// | linear_fp8_..     | the same                                        | 8, 32, 64          | 4, 8  |
// | linear_int8_..    | fragments of int8, made in the same launch      | 8, 32, 64          | 4, 8  |
// | linear_f32        | f32; plain multiplications, one chain, no slices | 16                 | 4     |
//
// Rounding. Where x is read as fragments, all thread blocks of a launch make them together, by tickets, while the first stages
// of weights are on their way, and wait until all are made (`round.cuh`): a launch less than rounding apart, and the same bits.
//
// A norm before the product. Numbers times the norm's weights are what is rounded, and the row's factor comes to its finished
// sums (for weights in groups, to the scales of x): so nobody reads a row before the product does. The factor is of sums of 32
// squares each, which the product before left behind when it added to the row.
//
// Weights in groups: products of whole numbers are exact within a group of 32 or 128 input features; the group's sum is
// scaled and added in f32, groups in ascending order. Weights of e4m3: codes become bf16 in registers, and are multiplied as
// such weights are; each 128 input features are a chain from zero, scaled and added as above. An H200 brings a multiprocessor
// 33 codes a nanosecond; making numbers of them, 9 instructions for 4, is a third of what it issues then.
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
DEVICE void bf16_from_fragments(const uint8_t* weights, Rounding x, Output to, Job job) {
    auto tile = with_ring<Bf16FromFragments<TOKENS>>();
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * STAGE_BYTES;
    tile.x = x;
    run(job, to, tile);
}

template <int TOKENS>
DEVICE void fp8(const uint8_t* weights, Rounding x, Output to, Job job) {
    auto tile = with_ring<Fp8<TOKENS>>();
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * FP8_STAGE_BYTES;
    tile.x = x;
    tile.x.num_stages = job.num_stages * (FP8_STAGE_FEATURES / BF16_STAGE_FEATURES);
    run(job, to, tile);
}

template <int TOKENS, Codes CODES>
DEVICE void grouped(const uint8_t* weights, Rounding x, Output to, Job job, uint32_t flags) {
    auto tile = with_ring<Grouped<TOKENS, CODES>>();
    tile.has_min = CODES != Codes::INT8_LONG && (flags & WEIGHT_HAS_MIN) != 0;
    tile.has_table = CODES == Codes::INT4_SHORT && (flags & WEIGHT_HAS_TABLE) != 0;
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * tile.weight_bytes();
    tile.x = x;
    run(job, to, tile);
}

}  // namespace

// Parameters of all products:
//   weights       packed, see weight.cuh
//   x             [num_rows, in_features] f32
//   rounded       where fragments of it are made, in so many units (see round.cuh), ticket_units of them at a time
//   out           [num_rows, out_features] f32, half as wide for SwiGLU
//   bias          [out_features] f32, or null
//   partials      sums of slices, where there are several in the grid
//   arrivals      four counts of the rounding, then one for each panel and tile of tokens; zeros before and after
//   num_stages    of a panel; slice_stages of them are a slice
//   flags         what the weight is, see weight.cuh
//   epilogue      0 store, 1 add, 2 SwiGLU
//   norm_weight   [in_features] where x is normalised, else null; norm_squares are the sums of its squares, 32 numbers each, and
//                 norm_eps is added to their mean
//   squares       null, or where to leave such sums of what was stored or added
// Grid: tiles of tokens, panels, slices (or 1: one thread block goes through all of them).
#define PARAMETERS                                                                                                     \
    const uint8_t* weights, const float* x, uint8_t* rounded, float* out, const float* bias, float* partials,          \
        uint32_t* arrivals, uint32_t num_rows, uint32_t in_features, uint32_t out_features, uint32_t num_stages,       \
        uint32_t slice_stages, uint32_t num_units, uint32_t ticket_units, uint32_t flags, uint32_t epilogue,           \
        const float* norm_weight, const float* norm_squares, float norm_eps, float* squares
#define NORM Norm{norm_weight, norm_squares, (in_features + SQUARES_FEATURES - 1) / SQUARES_FEATURES, in_features, norm_eps}
#define OUTPUT Output{out, bias, squares, num_rows, out_features, flags & WEIGHT_IS_GATE_UP, epilogue, NORM}
#define JOB Job{weights, num_stages, slice_stages, partials, arrivals + ROUND_COUNTS}
#define ROUNDING Rounding{x, rounded, arrivals, num_rows, in_features, num_stages, num_units, ticket_units}

KERNEL(linear_bf16_x8, (128), PARAMETERS) {
    bf16_from_f32<8, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x8_norm, (128), PARAMETERS) {
    bf16_from_f32<8, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x16, (128), PARAMETERS) {
    bf16_from_f32<16, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x16_norm, (128), PARAMETERS) {
    bf16_from_f32<16, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x32, (128), PARAMETERS) {
    bf16_from_f32<32, false>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_x32_norm, (128), PARAMETERS) {
    bf16_from_f32<32, true>(weights, x, OUTPUT, JOB);
}

KERNEL(linear_bf16_t64, (128), PARAMETERS) {
    bf16_from_fragments<64>(weights, ROUNDING, OUTPUT, JOB);
}

KERNEL(linear_bf16_t128, (256), PARAMETERS) {
    bf16_from_fragments<128>(weights, ROUNDING, OUTPUT, JOB);
}

KERNEL(linear_fp8_t8, (128, 2), PARAMETERS) {
    fp8<8>(weights, ROUNDING, OUTPUT, JOB);
}

KERNEL(linear_fp8_t32, (128, 2), PARAMETERS) {
    fp8<32>(weights, ROUNDING, OUTPUT, JOB);
}

KERNEL(linear_fp8_t64, (256, 1), PARAMETERS) {
    fp8<64>(weights, ROUNDING, OUTPUT, JOB);
}

KERNEL(linear_int8_long_t8, (128, 2), PARAMETERS) {
    grouped<8, Codes::INT8_LONG>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_long_t32, (128, 2), PARAMETERS) {
    grouped<32, Codes::INT8_LONG>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_long_t64, (256, 1), PARAMETERS) {
    grouped<64, Codes::INT8_LONG>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t8, (128, 2), PARAMETERS) {
    grouped<8, Codes::INT8_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t32, (128, 2), PARAMETERS) {
    grouped<32, Codes::INT8_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t64, (256, 1), PARAMETERS) {
    grouped<64, Codes::INT8_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t8, (128, 2), PARAMETERS) {
    grouped<8, Codes::INT4_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t32, (128, 2), PARAMETERS) {
    grouped<32, Codes::INT4_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t64, (256, 1), PARAMETERS) {
    grouped<64, Codes::INT4_SHORT>(weights, ROUNDING, OUTPUT, JOB, flags);
}

// f32 weights: a thread block has 64 features and 16 tokens, a thread one feature and every second token. One chain over
// the input features; no slices.
KERNEL(linear_f32, (128), PARAMETERS) {
    constexpr int TOKENS = 16;
    constexpr int FEATURES = 64;
    constexpr int K = 64;
    (void)rounded;
    (void)partials;
    (void)arrivals;
    (void)num_stages;
    (void)slice_stages;
    (void)num_units;
    (void)ticket_units;
    const Output to = OUTPUT;
    SHARED_ARRAY(float, x_numbers, K * TOKENS);
    SHARED_ARRAY(float, factors, TOKENS);
    const uint32_t lane = threadIdx.x % FEATURES;
    const uint32_t first = threadIdx.x / FEATURES * (TOKENS / 2);
    const uint32_t first_row = blockIdx.x * TOKENS;
    const float* panel = reinterpret_cast<const float*>(weights) + size_t(blockIdx.y) * in_features * FEATURES + lane;
    for (uint32_t token = warp_index(); token < TOKENS; token += 4) {
        const bool has_factor = norm_weight && first_row + token < num_rows;
        const float factor = has_factor ? norm_factor(to.norm, first_row + token) : 1.0f;
        if (lane_index() == 0) {
            factors[token] = factor;
        }
    }
    float sums[TOKENS / 2] = {};
    for (uint32_t stretch = 0; stretch < in_features; stretch += K) {
        const uint32_t len = min(uint32_t(K), in_features - stretch);
        __syncthreads();
        for (uint32_t index = threadIdx.x; index < TOKENS * K; index += 128) {
            const uint32_t row = first_row + index / K;
            const uint32_t feature = stretch + index % K;
            const bool is_there = row < num_rows && index % K < len;
            float number = is_there ? x[size_t(row) * in_features + feature] : 0.0f;
            if (norm_weight && is_there) {
                number *= norm_weight[feature];
            }
            x_numbers[index % K * TOKENS + index / K] = number;
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
    const uint32_t cols = epilogue == SWIGLU ? out_features / 2 : out_features;
    const uint32_t feature = weight_feature_f32(out_features, to.is_gate_up, blockIdx.y, lane);
    const uint32_t num_squares = (out_features + SQUARES_FEATURES - 1) / SQUARES_FEATURES;
    const float own_bias = bias && feature != NO_FEATURE ? bias[feature] : 0.0f;
    UNROLL
    for (int i = 0; i < TOKENS / 2; ++i) {
        const uint32_t row = first_row + first + i;
        const bool is_there = row < num_rows && feature != NO_FEATURE;
        float y = sums[i];
        if (norm_weight) {
            y *= factors[first + i];
        }
        y += own_bias;
        const float up = __shfl_xor_sync(ALL_LANES, y, 1);
        if (epilogue == SWIGLU) {
            if (is_there && lane % 2 == 0) {
                out[size_t(row) * cols + feature] = y / (1.0f + expf(-y)) * up;
            }
            continue;
        }
        if (is_there) {
            float* at = out + size_t(row) * cols + feature;
            y = epilogue == ADD ? *at + y : y;
            *at = y;
        }
        if (squares) {
            // A warp has 32 features side by side.
            const float sum = warp_sum(is_there ? y * y : 0.0f);
            const uint32_t square = (blockIdx.y * FEATURES + lane) / SQUARES_FEATURES;
            if (lane_index() == 0 && row < num_rows && square < num_squares) {
                squares[size_t(row) * num_squares + square] = sum;
            }
        }
    }
}
