// From stages to outputs: the loop over a thread block's stages, slices and their sums, bias and epilogues.
#pragma once

#include "async_copy.cuh"
#include "memory.cuh"
#include "warp.cuh"
#include "weight.cuh"

namespace {

// What happens to finished sums.
constexpr uint32_t ADD = 1;
constexpr uint32_t SWIGLU = 2;

// Numbers of a row whose squares are one sum: the features of a warp when outputs are stored.
constexpr int SQUARES_FEATURES = 32;

// x is normalised before the product (see rms_norm.cu): each number times its weight when it is read, each row by its factor
// when its sums are finished. The row's squares come as sums of 32 each. No weight: x is as it should be.
struct Norm {
    const float* weight;
    // [num_rows][num_sums]
    const float* squares;
    uint32_t num_sums;
    uint32_t dim;
    float eps;
};

struct Output {
    float* out;
    const float* bias;
    // Of the outputs, [num_rows][out_features / 32, rounded up], where something is added and the next norm wants them.
    float* squares;
    uint32_t num_rows;
    uint32_t out_features;
    uint32_t is_gate_up;
    uint32_t epilogue;
    Norm norm;
};

// What the numbers of a row are multiplied by, in all lanes of a warp: sums in ascending order by lanes, then lanes.
DEVICE float norm_factor(const Norm &norm, uint32_t row) {
    const float* sums = norm.squares + size_t(row) * norm.num_sums;
    float sum = 0.0f;
    for (uint32_t i = lane_index(); i < norm.num_sums; i += 32) {
        sum += sums[i];
    }
    return 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(norm.dim) + norm.eps);
}

// What a thread block computes, and where it leaves a slice's sums if others compute the rest.
struct Job {
    // Of the panel.
    const uint8_t* weights;
    uint32_t num_stages;
    // Stages of a slice.
    uint32_t slice_stages;
    float* partials;
    uint32_t* arrivals;
};

// Numbers from the sums of one token to the next in shared memory. Four more than there are, so that lanes which differ in
// their tokens write to different banks.
constexpr int SUMS_STRIDE = PANEL_FEATURES + 4;

// Leaves the sums of this thread block's slice in memory. True for the last of all slices, which gets what they add up to.
template <int THREADS, int TOKENS>
DEVICE bool merge(const Job &job, float* sums, uint32_t num_tokens) {
    constexpr int QUADS = PANEL_FEATURES / 4;
    const uint32_t num_slices = gridDim.z;
    const size_t unit = size_t(blockIdx.y) * gridDim.x + blockIdx.x;
    // [unit][slice][token][feature]
    constexpr size_t slice_quads = TOKENS * QUADS;
    float* partials = job.partials + unit * num_slices * slice_quads * 4;
    float* own = partials + blockIdx.z * slice_quads * 4;
    for (uint32_t at = threadIdx.x; at < num_tokens * QUADS; at += THREADS) {
        store_float4(own + at * 4, load_float4(sums + at / QUADS * SUMS_STRIDE + at % QUADS * 4));
    }
    SHARED_ARRAY(uint32_t, num_before, 1);
    // What all threads wrote is there before the count says so.
    __syncthreads();
    if (threadIdx.x == 0) {
        num_before[0] = add_acquire_release(job.arrivals + unit, 1);
    }
    __syncthreads();
    if (num_before[0] + 1 < num_slices) {
        return false;
    }
    if (threadIdx.x == 0) {
        // As it was found, for the next launch.
        job.arrivals[unit] = 0;
    }
    UNROLL_BY(4)
    for (uint32_t at = threadIdx.x; at < num_tokens * QUADS; at += THREADS) {
        float4 sum = load_float4(partials + at * 4);
        UNROLL_BY(4)
        for (uint32_t slice = 1; slice < num_slices; ++slice) {
            const float4 next = load_float4(partials + (slice * slice_quads + at) * 4);
            sum.x += next.x;
            sum.y += next.y;
            sum.z += next.z;
            sum.w += next.w;
        }
        store_float4(sums + at / QUADS * SUMS_STRIDE + at % QUADS * 4, sum);
    }
    __syncthreads();
    return true;
}

// Finished sums, [token][feature of the panel], times their tokens' factors. Few steps, and registers are short: nothing is unrolled.
template <int THREADS>
DEVICE void multiply_by_factors(float* sums, const float* factors, uint32_t num_tokens) {
    UNROLL_BY(1)
    for (uint32_t token = threadIdx.x / PANEL_FEATURES; token < num_tokens; token += THREADS / PANEL_FEATURES) {
        sums[token * SUMS_STRIDE + threadIdx.x % PANEL_FEATURES] *= factors[token];
    }
    __syncthreads();
}

// Of outputs that lie where their sums did, each written by the thread that reads it here. A warp has 32 features of a token.
template <int THREADS>
DEVICE void leave_squares(const Output &to, const float* outputs, uint32_t first_token, uint32_t num_tokens) {
    const uint32_t place = threadIdx.x % PANEL_FEATURES;
    const uint32_t num_squares = (to.out_features + SQUARES_FEATURES - 1) / SQUARES_FEATURES;
    const uint32_t square = (blockIdx.y * PANEL_FEATURES + place) / SQUARES_FEATURES;
    const bool is_there = blockIdx.y * PANEL_FEATURES + place < to.out_features;
    UNROLL_BY(1)
    for (uint32_t token = threadIdx.x / PANEL_FEATURES; token < num_tokens; token += THREADS / PANEL_FEATURES) {
        const float y = is_there ? outputs[token * SUMS_STRIDE + place] : 0.0f;
        const float sum = warp_sum(y * y);
        if (lane_index() == 0 && square < num_squares) {
            to.squares[size_t(first_token + token) * num_squares + square] = sum;
        }
    }
}

// From finished sums, [token][feature of the panel], to outputs.
template <int THREADS>
DEVICE void finish(const Output &to, float* sums, uint32_t first_token, uint32_t num_tokens) {
    if (to.epilogue == SWIGLU) {
        const uint32_t cols = to.out_features / 2;
        const uint32_t output = threadIdx.x % (PANEL_FEATURES / 2);
        const uint32_t col = blockIdx.y * (PANEL_FEATURES / 2) + output;
        if (col >= cols) {
            return;
        }
        const float gate_bias = to.bias ? to.bias[col] : 0.0f;
        const float up_bias = to.bias ? to.bias[cols + col] : 0.0f;
        sums += output / 8 * 16 + output % 8;
        for (uint32_t token = threadIdx.x / (PANEL_FEATURES / 2); token < num_tokens; token += THREADS * 2 / PANEL_FEATURES) {
            const float gate = sums[token * SUMS_STRIDE] + gate_bias;
            const float up = sums[token * SUMS_STRIDE + 8] + up_bias;
            to.out[size_t(first_token + token) * cols + col] = gate / (1.0f + expf(-gate)) * up;
        }
        return;
    }
    const uint32_t place = threadIdx.x % PANEL_FEATURES;
    const uint32_t tile = blockIdx.y * TILES_OF_PANEL + place / 16;
    const uint32_t feature = weight_feature(to.out_features, to.is_gate_up, tile, place % 16);
    if (feature == NO_FEATURE) {
        return;
    }
    const float bias = to.bias ? to.bias[feature] : 0.0f;
    float* out = to.out + size_t(first_token) * to.out_features + feature;
    sums += place;
    for (uint32_t token = threadIdx.x / PANEL_FEATURES; token < num_tokens; token += THREADS / PANEL_FEATURES) {
        float y = sums[token * SUMS_STRIDE] + bias;
        float* at = out + size_t(token) * to.out_features;
        y = to.epilogue == ADD ? *at + y : y;
        *at = y;
        sums[token * SUMS_STRIDE] = y;
    }
}

// When the factors of a tile's tokens are computed: not at all (they are in x), first, or last, where there are no registers
// before.
enum class Factors { NONE, FIRST, LAST };

// The factors of a tile's tokens, where x is normalised.
template <class Tile>
DEVICE void norm_factors(const Output &to, float* factors) {
    if (to.norm.weight) {
        const uint32_t first_token = blockIdx.x * Tile::TOKENS;
        const uint32_t num_tokens = min(uint32_t(Tile::TOKENS), to.num_rows - first_token);
        UNROLL_BY(1)
        for (uint32_t token = warp_index(); token < num_tokens; token += Tile::THREADS / 32) {
            const float factor = norm_factor(to.norm, first_token + token);
            if (lane_index() == 0) {
                factors[token] = factor;
            }
        }
    }
}

// Goes through the stages of this thread block's slices. `Tile` knows what a stage holds: `load_weights(stage, slot)` and
// `load_x(stage, slot)` start the copies of one, `multiply(slot, sums)` adds its products. Where x is rounded first
// (`ROUNDS_X`), `round_x()` does it while the first weights are on their way.
template <class Tile>
DEVICE void run(const Job &job, const Output &to, Tile &tile) {
    constexpr int STAGES = Tile::STAGES;
    constexpr int TOKEN_TILES = Tile::TOKEN_TILES;
    const uint32_t first = gridDim.z > 1 ? blockIdx.z * job.slice_stages : 0;
    const uint32_t end = gridDim.z > 1 ? min(first + job.slice_stages, job.num_stages) : job.num_stages;

    float sums[2][TOKEN_TILES][4];
    float slice[2][TOKEN_TILES][4];
    UNROLL
    for (int m = 0; m < 2; ++m) {
        UNROLL
        for (int n = 0; n < TOKEN_TILES; ++n) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                sums[m][n][i] = 0.0f;
                slice[m][n][i] = 0.0f;
            }
        }
    }

    UNROLL
    for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
        if (first + ahead < end) {
            tile.load_weights(first + ahead, ahead);
            if (!Tile::ROUNDS_X) {
                tile.load_x(first + ahead, ahead);
            }
        }
        if (!Tile::ROUNDS_X) {
            commit_copies();
        }
    }
    if (Tile::ROUNDS_X) {
        tile.round_x(to.norm);
        UNROLL
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
            if (first + ahead < end) {
                tile.load_x(first + ahead, ahead);
            }
            commit_copies();
        }
    }
    SHARED_ARRAY(float, factors, Tile::TOKENS);
    if (Tile::FACTORS == Factors::FIRST) {
        // While the first stages are on their way.
        norm_factors<Tile>(to, factors);
    }
    uint32_t in_slice = 0;
    bool is_first_slice = true;
    int slot = 0;
    for (uint32_t stage = first; stage < end; ++stage) {
        wait_copies<STAGES - 2>();
        // Every thread's copies of this stage are there, and nobody reads the stage before any more.
        __syncthreads();
        const uint32_t next = stage + STAGES - 1;
        if (next < end) {
            const int free_slot = slot == 0 ? STAGES - 1 : slot - 1;
            tile.load_weights(next, free_slot);
            tile.load_x(next, free_slot);
        }
        commit_copies();
        tile.multiply(slot, slice);
        slot = slot + 1 == STAGES ? 0 : slot + 1;
        ++in_slice;
        if (in_slice == job.slice_stages || stage + 1 == end) {
            UNROLL
            for (int m = 0; m < 2; ++m) {
                UNROLL
                for (int n = 0; n < TOKEN_TILES; ++n) {
                    UNROLL
                    for (int i = 0; i < 4; ++i) {
                        sums[m][n][i] = is_first_slice ? slice[m][n][i] : sums[m][n][i] + slice[m][n][i];
                        slice[m][n][i] = 0.0f;
                    }
                }
            }
            in_slice = 0;
            is_first_slice = false;
        }
    }

    // The ring is read by nobody any more: it holds the sums now.
    wait_copies<0>();
    __syncthreads();
    float* shared_sums = reinterpret_cast<float*>(tile.ring);
    const int place = Tile::first_feature_tile() * 16 + Tile::lane() / 4;
    float* own = shared_sums + (Tile::first_token() + Tile::lane() % 4 * 2) * SUMS_STRIDE + place;
    UNROLL
    for (int m = 0; m < 2; ++m) {
        UNROLL
        for (int n = 0; n < TOKEN_TILES; ++n) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                own[(n * 8 + i % 2) * SUMS_STRIDE + m * 16 + i / 2 * 8] = sums[m][n][i];
            }
        }
    }
    if (Tile::FACTORS == Factors::LAST) {
        norm_factors<Tile>(to, factors);
    }
    __syncthreads();
    const uint32_t first_token = blockIdx.x * Tile::TOKENS;
    const uint32_t num_tokens = min(uint32_t(Tile::TOKENS), to.num_rows - first_token);
    if (gridDim.z == 1 || merge<Tile::THREADS, Tile::TOKENS>(job, shared_sums, num_tokens)) {
        if (Tile::FACTORS != Factors::NONE && to.norm.weight) {
            multiply_by_factors<Tile::THREADS>(shared_sums, &factors[0], num_tokens);
        }
        finish<Tile::THREADS>(to, shared_sums, first_token, num_tokens);
        if (to.squares) {
            leave_squares<Tile::THREADS>(to, shared_sums, first_token, num_tokens);
        }
    }
}

}  // namespace
