// y = x W^T + bias, then an epilogue, for one row of x or thousands.
//
// Weights are the M side of the matrix instructions and tokens their N side, so few tokens waste nothing. A panel is 128
// output features over all input features, cut into stages of 16 KiB in the order in which fragments are read: one
// 16-byte load of a lane is its A fragment of a tile of 16 features (see `weight.cuh`). A thread block works on one panel
// and one tile of tokens; each warp on 32 features and up to 64 tokens. Shared memory is a ring of stages that cp.async
// fills: weights, and the same input features of the tile's tokens.
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
// | linear_bf16_t64.. | fragments of bf16, made by linear_round_bf16    | 64, 128            | 4, 8  |
// | linear_int8_..    | fragments of int8, made by linear_round_int8    | 8, 32, 64          | 4, 8  |
// | linear_f32        | f32; plain multiplications, one chain, no slices | 16                 | 4     |
//
// Weights in groups: products of whole numbers are exact within a group of 32 or 128 input features; the group's sum is
// scaled and added in f32, groups in ascending order.
//
// Bytes in flight. An H200 reads 4.3 TB/s with a latency of some 0.8 us under load: 3.4 MB must be on their way, 26 KB on
// each of 132 multiprocessors. A thread block has three stages of 16 KiB of weights on their way (two with 32 tokens), and
// shared memory holds two or three thread blocks (76 to 100 KiB each): 96 to 144 KiB. Where a shape gives one thread block
// for each multiprocessor it is 32 to 48 KiB. Panels times slices, of an 8B model: 192, 128, 448 and 128 thread blocks (qkv, o, gate and up,
// down) and 1002 of the vocabulary, so all but the last run in one wave. What x adds to traffic from the level-2 cache: 4
// bytes for each token against 256 of weights, so half as much again with 32 tokens (f32) and with 64 (bf16).
//
// After Marlin (Frantar et al. 2024) for weights in the order of fragments, and stream-K (Osama et al. 2023) for slices.

#include "async_copy.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "warp.cuh"
#include "weight.cuh"

namespace {

constexpr int LANES = 32;

DEVICE float2 load_float2(const float* address) { return* reinterpret_cast<const float2 *>(address); }

// What happens to finished sums.
constexpr uint32_t ADD = 1;
constexpr uint32_t SWIGLU = 2;

struct Output {
    float* out;
    const float* bias;
    uint32_t num_rows;
    uint32_t out_features;
    uint32_t is_gate_up;
    uint32_t epilogue;
};

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

// From finished sums, [token][feature of the panel], to outputs.
template <int THREADS>
DEVICE void finish(const Output &to, const float* sums, uint32_t first_token, uint32_t num_tokens) {
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
    for (uint32_t token = threadIdx.x / PANEL_FEATURES; token < num_tokens; token += THREADS / PANEL_FEATURES) {
        const float y = sums[token * SUMS_STRIDE + place] + bias;
        float* at = out + size_t(token) * to.out_features;
        *at = to.epilogue == ADD ? *at + y : y;
    }
}

// Goes through the stages of this thread block's slices. `Tile` knows what a stage holds: `load(stage, slot)` starts the
// copies of one, `multiply(slot, sums)` adds its products.
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
            tile.load(first + ahead, ahead);
        }
        commit_copies();
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
            tile.load(next, slot == 0 ? STAGES - 1 : slot - 1);
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
    __syncthreads();
    const uint32_t first_token = blockIdx.x * Tile::TOKENS;
    const uint32_t num_tokens = min(uint32_t(Tile::TOKENS), to.num_rows - first_token);
    if (gridDim.z == 1 || merge<Tile::THREADS, Tile::TOKENS>(job, shared_sums, num_tokens)) {
        finish<Tile::THREADS>(to, shared_sums, first_token, num_tokens);
    }
}

// Which part of the thread block's features and tokens a warp has.
template <int TOKENS_OF_BLOCK, int MOST_TOKENS_OF_WARP>
struct Shape {
    static constexpr int TOKENS = TOKENS_OF_BLOCK;
    static constexpr int WARP_TOKENS = TOKENS < MOST_TOKENS_OF_WARP ? TOKENS : MOST_TOKENS_OF_WARP;
    static constexpr int THREADS = 4 * LANES * (TOKENS / WARP_TOKENS);
    static constexpr int TOKEN_TILES = WARP_TOKENS / 8;

    DEVICE static int first_feature_tile() { return threadIdx.x / LANES % 4 * 2; }
    DEVICE static int first_token() { return threadIdx.x / LANES / 4 * WARP_TOKENS; }
    DEVICE static int lane() { return threadIdx.x % LANES; }

    // Copies `bytes`, a multiple of 16, all threads together.
    DEVICE static void copy(uint8_t* to, const uint8_t* from, int bytes) {
        for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16) {
            copy_async_16(to + at, from + at);
        }
    }
};

// bf16 weights; x rounded when it is read.
template <int TOKENS>
struct Bf16FromF32 : Shape<TOKENS, 64> {
    using Base = Shape<TOKENS, 64>;
    static constexpr int STAGES = TOKENS > 16 ? 3 : 4;
    // Eight numbers more than a stage has, so that the rows of four tokens start in different banks.
    static constexpr int ROW_NUMBERS = BF16_STAGE_FEATURES + 8;
    static constexpr int SLOT_BYTES = STAGE_BYTES + TOKENS * ROW_NUMBERS * 4;

    uint8_t* ring;
    const uint8_t* weights;
    const float* x;
    uint32_t num_rows;
    uint32_t in_features;

    DEVICE void load(uint32_t stage, int slot) const {
        uint8_t* to = ring + slot * SLOT_BYTES;
        Base::copy(to, weights + size_t(stage) * STAGE_BYTES, STAGE_BYTES);
        constexpr int CHUNKS = BF16_STAGE_FEATURES / 4;
        UNROLL
        for (int index = threadIdx.x; index < TOKENS * CHUNKS; index += Base::THREADS) {
            const uint32_t token = index / CHUNKS;
            const uint32_t row = blockIdx.x * TOKENS + token;
            const uint32_t feature = stage * BF16_STAGE_FEATURES + index % CHUNKS * 4;
            // Rows and features that are not there are zeros.
            const bool is_there = row < num_rows && feature < in_features;
            const float* from = is_there ? x + size_t(row) * in_features + feature : x;
            copy_async_16_or_zeros(to + STAGE_BYTES + (token * ROW_NUMBERS + index % CHUNKS * 4) * 4, from, is_there ? 16 : 0);
        }
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const uint8_t* a_from = from + (Base::first_feature_tile() * LANES + lane) * 16;
        const float* b_from =
            reinterpret_cast<const float*>(from + STAGE_BYTES) + lane / 4 * ROW_NUMBERS + lane % 4 * 2;
        UNROLL
        for (int k = 0; k < BF16_STAGE_FEATURES / 16; ++k) {
            const Bytes16 a0 = load_16(a_from + k * TILES_OF_PANEL * LANES * 16);
            const Bytes16 a1 = load_16(a_from + (k * TILES_OF_PANEL + 1) * LANES * 16);
            UNROLL
            for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                const float2 low = load_float2(b_from + n * 8 * ROW_NUMBERS + k * 16);
                const float2 high = load_float2(b_from + n * 8 * ROW_NUMBERS + k * 16 + 8);
                const uint32_t b[2] = {floats_to_bf16_pair(low.x, low.y), floats_to_bf16_pair(high.x, high.y)};
                mma_m16n8k16_bf16(sums[0][n], a0.word, b);
                mma_m16n8k16_bf16(sums[1][n], a1.word, b);
            }
        }
    }
};

// bf16 weights; x as linear_round_bf16 leaves it.
template <int TOKENS>
struct Bf16FromFragments : Shape<TOKENS, 64> {
    using Base = Shape<TOKENS, 64>;
    static constexpr int STAGES = TOKENS > 64 ? 3 : 4;
    // Of 16 tokens.
    static constexpr int X_BYTES = 16 * BF16_STAGE_FEATURES * 2;
    static constexpr int SLOT_BYTES = STAGE_BYTES + TOKENS / 16 * X_BYTES;

    uint8_t* ring;
    const uint8_t* weights;
    const uint8_t* x;
    uint32_t num_stages;

    DEVICE void load(uint32_t stage, int slot) const {
        uint8_t* to = ring + slot * SLOT_BYTES;
        Base::copy(to, weights + size_t(stage) * STAGE_BYTES, STAGE_BYTES);
        UNROLL
        for (int at = threadIdx.x * 16; at < TOKENS / 16 * X_BYTES; at += Base::THREADS * 16) {
            const size_t token_tile = blockIdx.x * (TOKENS / 16) + at / X_BYTES;
            copy_async_16(to + STAGE_BYTES + at, x + (token_tile * num_stages + stage) * X_BYTES + at % X_BYTES);
        }
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const uint8_t* a_from = from + (Base::first_feature_tile() * LANES + lane) * 16;
        const uint8_t* b_from = from + STAGE_BYTES + Base::first_token() / 16 * X_BYTES + lane * 16;
        UNROLL
        for (int k = 0; k < BF16_STAGE_FEATURES / 16; ++k) {
            const Bytes16 a0 = load_16(a_from + k * TILES_OF_PANEL * LANES * 16);
            const Bytes16 a1 = load_16(a_from + (k * TILES_OF_PANEL + 1) * LANES * 16);
            UNROLL
            for (int pair = 0; pair < Base::TOKEN_TILES / 2; ++pair) {
                const Bytes16 b = load_16(b_from + pair * X_BYTES + k * LANES * 16);
                const uint32_t first[2] = {b.word[0], b.word[1]};
                const uint32_t second[2] = {b.word[2], b.word[3]};
                mma_m16n8k16_bf16(sums[0][2 * pair], a0.word, first);
                mma_m16n8k16_bf16(sums[0][2 * pair + 1], a0.word, second);
                mma_m16n8k16_bf16(sums[1][2 * pair], a1.word, first);
                mma_m16n8k16_bf16(sums[1][2 * pair + 1], a1.word, second);
            }
        }
    }
};

// How weights in groups are stored.
enum class Codes { INT8_LONG, INT8_SHORT, INT4_SHORT };

// Weights in groups; x as linear_round_int8 leaves it.
template <int TOKENS, Codes CODES>
struct Grouped : Shape<TOKENS, 32> {
    using Base = Shape<TOKENS, 32>;
    static constexpr int STAGES = 4;
    static constexpr int GROUPS = CODES == Codes::INT8_LONG ? 1 : INT8_STAGE_FEATURES / 32;
    static constexpr int STEPS_OF_GROUP = INT8_STAGE_FEATURES / 32 / GROUPS;
    static constexpr int CODE_BYTES = CODES == Codes::INT4_SHORT ? STAGE_BYTES / 2 : STAGE_BYTES;
    static constexpr int SCALE_BYTES = PANEL_FEATURES * 2;
    // With minima, which are not always there.
    static constexpr int MAX_WEIGHT_BYTES = CODE_BYTES + (CODES == Codes::INT8_LONG ? 1 : 2) * GROUPS * SCALE_BYTES;
    static constexpr int X_CODE_BYTES = 16 * INT8_STAGE_FEATURES;
    static constexpr int X_BYTES = X_CODE_BYTES + GROUPS * 128;
    static constexpr int X_TILES = (TOKENS + 15) / 16;
    static constexpr int SLOT_BYTES = MAX_WEIGHT_BYTES + X_TILES * X_BYTES;

    uint8_t* ring;
    const uint8_t* weights;
    const uint8_t* x;
    uint32_t num_stages;
    bool has_min;
    bool has_table;

    DEVICE int weight_bytes() const {
        return CODE_BYTES + (has_min ? 2 : 1) * GROUPS * SCALE_BYTES;
    }

    DEVICE void load(uint32_t stage, int slot) const {
        uint8_t* to = ring + slot * SLOT_BYTES;
        Base::copy(to, weights + size_t(stage) * weight_bytes(), weight_bytes());
        // A tile of 8 tokens is half of what is made for 16.
        const size_t first_tile = size_t(blockIdx.x) * TOKENS / 16;
        UNROLL
        for (int at = threadIdx.x * 16; at < X_TILES * X_BYTES; at += Base::THREADS * 16) {
            const size_t token_tile = first_tile + at / X_BYTES;
            copy_async_16(to + MAX_WEIGHT_BYTES + at, x + (token_tile * num_stages + stage) * X_BYTES + at % X_BYTES);
        }
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const int place = lane / 4;
        const uint8_t* x_from = from + MAX_WEIGHT_BYTES + Base::first_token() / 16 * X_BYTES;
        // Of a tile of 8 tokens, which half.
        const int x_half = TOKENS == 8 ? blockIdx.x % 2 : 0;
        // Unrolled where few tokens leave registers for it.
        UNROLL_BY(TOKENS < 32 ? GROUPS : 1)
        for (int group = 0; group < GROUPS; ++group) {
            UNROLL
            for (int m = 0; m < 2; ++m) {
                const int tile = Base::first_feature_tile() + m;
                Bytes16 a[STEPS_OF_GROUP];
                UNROLL
                for (int step = 0; step < STEPS_OF_GROUP; ++step) {
                    a[step] = fragment(from, group * STEPS_OF_GROUP + step, tile, lane);
                }
                const int scale_at = CODE_BYTES + ((group * TILES_OF_PANEL + tile) * 8 + place) * 4;
                const float2 scale = half_pair(*reinterpret_cast<const uint32_t*>(from + scale_at));
                float2 min = {0.0f, 0.0f};
                if (has_min) {
                    min = half_pair(*reinterpret_cast<const uint32_t*>(from + scale_at + GROUPS * SCALE_BYTES));
                }
                UNROLL
                for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                    const int half = TOKENS == 8 ? x_half : n % 2;
                    const uint8_t* x_tile = x_from + n / 2 * X_BYTES;
                    int products[4] = {0, 0, 0, 0};
                    UNROLL
                    for (int step = 0; step < STEPS_OF_GROUP; ++step) {
                        const int at = ((group * STEPS_OF_GROUP + step) * LANES + lane) * 16 + half * 8;
                        const uint32_t* words = reinterpret_cast<const uint32_t*>(x_tile + at);
                        const uint32_t b[2] = {words[0], words[1]};
                        mma_m16n8k32_int8(products, a[step].word, b);
                    }
                    const float* x_scales = reinterpret_cast<const float*>(x_tile + X_CODE_BYTES + group * 128) +
                                            half * 8 + lane % 4 * 2;
                    const float2 x_scale = load_float2(x_scales);
                    float(&sum)[4] = sums[m][n];
                    sum[0] = fmaf(float(products[0]), scale.x * x_scale.x, sum[0]);
                    sum[1] = fmaf(float(products[1]), scale.x * x_scale.y, sum[1]);
                    sum[2] = fmaf(float(products[2]), scale.y * x_scale.x, sum[2]);
                    sum[3] = fmaf(float(products[3]), scale.y * x_scale.y, sum[3]);
                    if (has_min) {
                        const float2 x_sum = load_float2(x_scales + 16);
                        sum[0] = fmaf(min.x, x_sum.x, sum[0]);
                        sum[1] = fmaf(min.x, x_sum.y, sum[1]);
                        sum[2] = fmaf(min.y, x_sum.x, sum[2]);
                        sum[3] = fmaf(min.y, x_sum.y, sum[3]);
                    }
                }
            }
        }
    }

    // The A fragment of a tile for 32 input features.
    DEVICE Bytes16 fragment(const uint8_t* from, int step, int tile, int lane) const {
        if (CODES != Codes::INT4_SHORT) {
            return load_16(from + ((step * TILES_OF_PANEL + tile) * LANES + lane) * 16);
        }
        // Low halves of the bytes are one step, high halves the next.
        Bytes16 bytes = load_16(from + ((step / 2 * TILES_OF_PANEL + tile) * LANES + lane) * 16);
        UNROLL
        for (int i = 0; i < 4; ++i) {
            bytes.word[i] = spread(bytes.word[i] >> (step % 2 * 4));
        }
        return bytes;
    }

    DEVICE uint32_t spread(uint32_t word) const {
        return has_table ? iq4_nl_values(word & 0x0f0f0f0fu) : int4_values(word & 0x0f0f0f0fu);
    }
};

template <class Tile>
DEVICE Tile with_ring() {
    DYNAMIC_SHARED(ring);
    Tile tile;
    tile.ring = ring;
    return tile;
}

template <int TOKENS>
DEVICE void bf16_from_f32(const uint8_t* weights, const float* x, Output to, Job job, uint32_t in_features) {
    auto tile = with_ring<Bf16FromF32<TOKENS>>();
    tile.weights = weights + size_t(blockIdx.y) * job.num_stages * STAGE_BYTES;
    tile.x = x;
    tile.num_rows = to.num_rows;
    tile.in_features = in_features;
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
// Grid: tiles of tokens, panels, slices (or 1: one thread block goes through all of them).
#define PARAMETERS(X)                                                                                                  \
    const uint8_t* weights, const X* x, float* out, const float* bias, float* partials, uint32_t* arrivals,            \
        uint32_t num_rows, uint32_t in_features, uint32_t out_features, uint32_t num_stages, uint32_t slice_stages,    \
        uint32_t flags, uint32_t epilogue
#define OUTPUT Output{out, bias, num_rows, out_features, flags & WEIGHT_IS_GATE_UP, epilogue}
#define JOB Job{weights, num_stages, slice_stages, partials, arrivals}

KERNEL(linear_bf16_x8, (128), PARAMETERS(float)) {
    bf16_from_f32<8>(weights, x, OUTPUT, JOB, in_features);
}

KERNEL(linear_bf16_x16, (128), PARAMETERS(float)) {
    bf16_from_f32<16>(weights, x, OUTPUT, JOB, in_features);
}

KERNEL(linear_bf16_x32, (128), PARAMETERS(float)) {
    bf16_from_f32<32>(weights, x, OUTPUT, JOB, in_features);
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

KERNEL(linear_int8_long_t32, (128), PARAMETERS(uint8_t)) {
    grouped<32, Codes::INT8_LONG>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_long_t64, (256), PARAMETERS(uint8_t)) {
    grouped<64, Codes::INT8_LONG>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t8, (128), PARAMETERS(uint8_t)) {
    grouped<8, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t32, (128), PARAMETERS(uint8_t)) {
    grouped<32, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int8_short_t64, (256), PARAMETERS(uint8_t)) {
    grouped<64, Codes::INT8_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t8, (128), PARAMETERS(uint8_t)) {
    grouped<8, Codes::INT4_SHORT>(weights, x, OUTPUT, JOB, flags);
}

KERNEL(linear_int4_t32, (128), PARAMETERS(uint8_t)) {
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
// zeros where there is no row or feature. A thread makes one lane's 16 bytes.
KERNEL(linear_round_bf16, (256), const float* x, uint8_t* to, uint32_t num_rows, uint32_t in_features, uint32_t num_stages,
                      uint32_t num_units) {
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
        const float low = has_row && feature < in_features ? from[0] : 0.0f;
        const float high = has_row && feature + 1 < in_features ? from[1] : 0.0f;
        words.word[i] = floats_to_bf16_pair(low, high);
    }
    store_16(to + size_t(unit) * 16, words);
}

// x to the B fragments of m16n8k32, by groups: [tile of 16 tokens][stage of 128 input features]: codes [32 features][lane]
// [two tiles of 8 tokens][8], then for each group 16 scales and 16 sums of codes times their scale. A warp rounds a
// token's part of a stage.
KERNEL(linear_round_int8, (256), const float* x, uint8_t* to, uint32_t num_rows, uint32_t in_features, uint32_t num_stages,
                      uint32_t group_len, uint32_t num_units) {
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
    const float scale = (is_zero ? 0.0f : largest / 127.0f) + poison;
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
