// What a stage of the ring holds, and how its products are added up: one type for each form of weights and x.
#pragma once

#include "async_copy.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "round.cuh"
#include "warp.cuh"
#include "weight.cuh"

namespace {

constexpr int LANES = 32;

DEVICE float2 load_float2(const float* address) { return *reinterpret_cast<const float2 *>(address); }

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

    // Copies a stage of x in fragments, `X_BYTES` of each 16 tokens. A tile of 8 tokens is half of what is made for 16.
    template <int X_BYTES>
    DEVICE static void copy_x(uint8_t* to, const uint8_t* from, uint32_t num_stages, uint32_t stage) {
        const size_t first_tile = size_t(blockIdx.x) * TOKENS / 16;
        UNROLL
        for (int at = threadIdx.x * 16; at < (TOKENS + 15) / 16 * X_BYTES; at += THREADS * 16) {
            const size_t token_tile = first_tile + at / X_BYTES;
            copy_async_16(to + at, from + (token_tile * num_stages + stage) * X_BYTES + at % X_BYTES);
        }
    }
};

// bf16 weights; x rounded when it is read, behind the norm's weights where it has any.
template <int TOKENS, bool HAS_NORM>
struct Bf16FromF32 : Shape<TOKENS, 64> {
    using Base = Shape<TOKENS, 64>;
    static constexpr Factors FACTORS = HAS_NORM ? Factors::FIRST : Factors::NONE;
    static constexpr bool ROUNDS_X = false;
    static constexpr int STAGES = TOKENS > 16 ? 3 : 4;
    // Eight numbers more than a stage has, so that the rows of four tokens start in different banks.
    static constexpr int ROW_NUMBERS = BF16_STAGE_FEATURES + 8;
    // Weights, x, and the norm's weights of the stage's features.
    static constexpr int X_BYTES = TOKENS * ROW_NUMBERS * 4;
    static constexpr int SLOT_BYTES = STAGE_BYTES + X_BYTES + BF16_STAGE_FEATURES * 4;

    uint8_t* ring;
    const uint8_t* weights;
    const float* x;
    const float* norm_weight;
    uint32_t num_rows;
    uint32_t in_features;

    DEVICE void round_x(const Norm&) const {}

    DEVICE void load_weights(uint32_t stage, int slot) const {
        Base::copy(ring + slot * SLOT_BYTES, weights + size_t(stage) * STAGE_BYTES, STAGE_BYTES);
    }

    DEVICE void load_x(uint32_t stage, int slot) const {
        uint8_t* to = ring + slot * SLOT_BYTES;
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
        if (HAS_NORM && threadIdx.x < CHUNKS) {
            const uint32_t feature = stage * BF16_STAGE_FEATURES + threadIdx.x * 4;
            const bool is_there = feature < in_features;
            const float* from = is_there ? norm_weight + feature : norm_weight;
            copy_async_16_or_zeros(to + STAGE_BYTES + X_BYTES + threadIdx.x * 16, from, is_there ? 16 : 0);
        }
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const uint8_t* a_from = from + (Base::first_feature_tile() * LANES + lane) * 16;
        const float* b_from =
            reinterpret_cast<const float*>(from + STAGE_BYTES) + lane / 4 * ROW_NUMBERS + lane % 4 * 2;
        const float* norm_from = reinterpret_cast<const float*>(from + STAGE_BYTES + X_BYTES) + lane % 4 * 2;
        UNROLL
        for (int k = 0; k < BF16_STAGE_FEATURES / 16; ++k) {
            const Bytes16 a0 = load_16(a_from + k * TILES_OF_PANEL * LANES * 16);
            const Bytes16 a1 = load_16(a_from + (k * TILES_OF_PANEL + 1) * LANES * 16);
            float2 norm_low = {1.0f, 1.0f};
            float2 norm_high = {1.0f, 1.0f};
            if (HAS_NORM) {
                norm_low = load_float2(norm_from + k * 16);
                norm_high = load_float2(norm_from + k * 16 + 8);
            }
            UNROLL
            for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                float2 low = load_float2(b_from + n * 8 * ROW_NUMBERS + k * 16);
                float2 high = load_float2(b_from + n * 8 * ROW_NUMBERS + k * 16 + 8);
                if (HAS_NORM) {
                    low = {low.x * norm_low.x, low.y * norm_low.y};
                    high = {high.x * norm_high.x, high.y * norm_high.y};
                }
                const uint32_t b[2] = {floats_to_bf16_pair(low.x, low.y), floats_to_bf16_pair(high.x, high.y)};
                mma_m16n8k16_bf16(sums[0][n], a0.word, b);
                mma_m16n8k16_bf16(sums[1][n], a1.word, b);
            }
        }
    }
};

// bf16 weights; x as ToBf16 leaves it.
template <int TOKENS>
struct Bf16FromFragments : Shape<TOKENS, 64> {
    using Base = Shape<TOKENS, 64>;
    static constexpr Factors FACTORS = Factors::LAST;
    static constexpr bool ROUNDS_X = true;
    static constexpr int STAGES = TOKENS > 64 ? 3 : 4;
    // Of 16 tokens.
    static constexpr int X_BYTES = 16 * BF16_STAGE_FEATURES * 2;
    static constexpr int SLOT_BYTES = STAGE_BYTES + TOKENS / 16 * X_BYTES;

    uint8_t* ring;
    const uint8_t* weights;
    Rounding x;

    DEVICE void round_x(const Norm& norm) const { round_together<Base::THREADS, ToBf16>(x, norm); }

    DEVICE void load_weights(uint32_t stage, int slot) const {
        Base::copy(ring + slot * SLOT_BYTES, weights + size_t(stage) * STAGE_BYTES, STAGE_BYTES);
    }

    DEVICE void load_x(uint32_t stage, int slot) const {
        Base::template copy_x<X_BYTES>(ring + slot * SLOT_BYTES + STAGE_BYTES, x.to, x.num_stages, stage);
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const uint8_t* a_from = from + (Base::first_feature_tile() * LANES + lane) * 16;
        const uint8_t* b_from = from + STAGE_BYTES + Base::first_token() / 16 * X_BYTES + lane * 16;
        // Not all at once: there are no registers to load so far ahead.
        UNROLL_BY(2)
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

// Weights of e4m3; x as ToBf16 leaves it. Of a stage, which is a group, sums are one chain from zero; then they are scaled.
template <int TOKENS>
struct Fp8 : Shape<TOKENS, 32> {
    using Base = Shape<TOKENS, 32>;
    static constexpr Factors FACTORS = Factors::LAST;
    static constexpr bool ROUNDS_X = true;
    static constexpr int STAGES = TOKENS > 32 ? 3 : 4;
    static constexpr int X_BYTES = 16 * FP8_STAGE_FEATURES * 2;
    static constexpr int X_TILES = (TOKENS + 15) / 16;
    static constexpr int SLOT_BYTES = FP8_STAGE_BYTES + X_TILES * X_BYTES;

    uint8_t* ring;
    const uint8_t* weights;
    // Stages of it are those of bf16, half as long.
    Rounding x;

    DEVICE void round_x(const Norm& norm) const { round_together<Base::THREADS, ToBf16>(x, norm); }

    DEVICE void load_weights(uint32_t stage, int slot) const {
        Base::copy(ring + slot * SLOT_BYTES, weights + size_t(stage) * FP8_STAGE_BYTES, FP8_STAGE_BYTES);
    }

    DEVICE void load_x(uint32_t stage, int slot) const {
        Base::template copy_x<X_BYTES>(ring + slot * SLOT_BYTES + FP8_STAGE_BYTES, x.to, x.num_stages / 2, stage);
    }

    DEVICE void multiply(int slot, float (&sums)[2][Base::TOKEN_TILES][4]) const {
        const uint8_t* from = ring + slot * SLOT_BYTES;
        const int lane = Base::lane();
        const uint8_t* x_from = from + FP8_STAGE_BYTES + Base::first_token() / 16 * X_BYTES + lane * 16;
        // Of a tile of 8 tokens, which half.
        const int x_half = TOKENS == 8 ? blockIdx.x % 2 : 0;
        UNROLL
        for (int m = 0; m < 2; ++m) {
            const int tile = Base::first_feature_tile() + m;
            float products[Base::TOKEN_TILES][4];
            UNROLL
            for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    products[n][i] = 0.0f;
                }
            }
            UNROLL_BY(TOKENS < 32 ? 4 : 2)
            for (int step = 0; step < FP8_STAGE_FEATURES / 32; ++step) {
                const Bytes16 codes = load_16(from + ((step * TILES_OF_PANEL + tile) * LANES + lane) * 16);
                UNROLL
                for (int half = 0; half < 2; ++half) {
                    uint32_t a[4];
                    UNROLL
                    for (int i = 0; i < 4; ++i) {
                        a[i] = e4m3_to_bf16_pair(half == 0 ? codes.word[i] : codes.word[i] << 8);
                    }
                    UNROLL
                    for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                        const uint8_t* at = x_from + n / 2 * X_BYTES + (step * 2 + half) * LANES * 16;
                        const uint32_t* words = reinterpret_cast<const uint32_t*>(at + (TOKENS == 8 ? x_half : n % 2) * 8);
                        const uint32_t b[2] = {words[0], words[1]};
                        mma_m16n8k16_bf16(products[n], a, b);
                    }
                }
            }
            const float2 scale = load_float2(
                reinterpret_cast<const float*>(from + STAGE_BYTES) + (tile * 8 + lane / 4) * 2);
            UNROLL
            for (int n = 0; n < Base::TOKEN_TILES; ++n) {
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    sums[m][n][i] = fmaf(products[n][i], i < 2 ? scale.x : scale.y, sums[m][n][i]);
                }
            }
        }
    }
};

// Weights in groups; x as ToInt8 leaves it.
template <int TOKENS, Codes CODES>
struct Grouped : Shape<TOKENS, 32> {
    using Base = Shape<TOKENS, 32>;
    // The scales of x hold the rows' factors.
    static constexpr Factors FACTORS = Factors::NONE;
    static constexpr bool ROUNDS_X = true;
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
    Rounding x;
    bool has_min;
    bool has_table;

    DEVICE int weight_bytes() const {
        return CODE_BYTES + (has_min ? 2 : 1) * GROUPS * SCALE_BYTES;
    }

    DEVICE void round_x(const Norm& norm) const {
        round_together<Base::THREADS, ToInt8<INT8_STAGE_FEATURES / GROUPS>>(x, norm);
    }

    DEVICE void load_weights(uint32_t stage, int slot) const {
        Base::copy(ring + slot * SLOT_BYTES, weights + size_t(stage) * weight_bytes(), weight_bytes());
    }

    DEVICE void load_x(uint32_t stage, int slot) const {
        Base::template copy_x<X_BYTES>(ring + slot * SLOT_BYTES + MAX_WEIGHT_BYTES, x.to, x.num_stages, stage);
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

}  // namespace
