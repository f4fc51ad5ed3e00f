// From the cache to shared memory, and from there to operands.
#pragma once

#include "async_copy.cuh"
#include "memory.cuh"
#include "numbers.cuh"
#include "units.cuh"

namespace {

// How numbers lie in the cache: a unit is a pair of them.
struct Bf16 {
    static constexpr int UNIT_BYTES = 4;
    static constexpr bool IS_QUANTIZED = false;
    // Parts that a query or probability is the sum of.
    static constexpr int PARTS = 1;

    DEVICE static uint32_t pair(const uint8_t* from) { return *reinterpret_cast<const uint32_t*>(from); }
};

struct Int8 {
    static constexpr int UNIT_BYTES = 2;
    static constexpr bool IS_QUANTIZED = true;
    static constexpr int PARTS = 2;

    // Two codes as bf16, exactly: `128 + code % 128` minus 128, or 256 where the code is negative.
    DEVICE static uint32_t pair(const uint8_t* from) {
        const uint32_t codes = *reinterpret_cast<const uint16_t*>(from);
        const uint32_t spread = (codes & 0xffu) | (codes & 0xff00u) << 8;
        const uint32_t low = (spread & 0x007f007fu) | 0x43004300u;
        const uint32_t zero = (spread & 0x00800080u) | 0x43004300u;
#ifdef __CUDACC__
        uint32_t values;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(values) : "r"(zero), "r"(0xbf80bf80u), "r"(low));
        return values;
#else
        return floats_to_bf16_pair(bf16_low(low) - bf16_low(zero), bf16_high(low) - bf16_high(zero));
#endif
    }
};

// Queries and probabilities are one number of bf16: what rounding them costs is little beside what the codes lost.
struct Fp8 {
    static constexpr int UNIT_BYTES = 2;
    static constexpr bool IS_QUANTIZED = true;
    static constexpr int PARTS = 1;

    DEVICE static uint32_t pair(const uint8_t* from) {
        const uint32_t codes = *reinterpret_cast<const uint16_t*>(from);
        return e4m3_to_bf16_pair(codes << 8 | codes << 16);
    }
};

// Tiles of K and V of one KV head, on their way through a ring in shared memory.
template <class Kv, int HEAD_DIM>
struct Tiles {
    static constexpr int STAGES = HEAD_DIM > 128 ? 2 : 4;
    static constexpr int UNIT = Kv::UNIT_BYTES;
    static constexpr int K_BYTES = HEAD_DIM / 2 * TILE * UNIT;
    static constexpr int V_BYTES = TILE / 2 * HEAD_DIM * UNIT;
    static constexpr int SCALE_BYTES = Kv::IS_QUANTIZED ? 2 * TILE * 4 : 0;
    static constexpr int SLOT_BYTES = K_BYTES + V_BYTES + SCALE_BYTES;

    const Batch& batch;
    // [STAGES] of K, V, scales.
    uint8_t* ring;
    // Blocks of two chunks, by pieces.
    uint32_t* blocks;
    // Of the tile at hand, tokens with numbers that are not finite.
    uint32_t* bad_tokens;
    const uint32_t* table;
    uint32_t kv_head;
    // Positions that some row sees.
    uint32_t start;
    uint32_t end;

    DEVICE static uint32_t swizzle(uint32_t row) { return (row & 3) * 8 * UNIT; }
    DEVICE static uint32_t k_at(uint32_t dim_pair, uint32_t token) {
        return dim_pair * TILE * UNIT + (token * UNIT ^ swizzle(dim_pair));
    }
    DEVICE static uint32_t v_at(uint32_t token_pair, uint32_t dim) {
        return token_pair * HEAD_DIM * UNIT + (dim * UNIT ^ swizzle(token_pair));
    }

    // Which blocks hold a chunk, by one warp.
    DEVICE void find_blocks(uint32_t chunk) const {
        const uint32_t position = chunk * CHUNK + lane_index() * PIECE;
        uint32_t block = 0;
        if (position < end && position + PIECE > start) {
            block = table[position / batch.block_size];
            if (block >= batch.num_blocks) {
                report_fault(batch.tables_fault, block, batch.num_blocks);
                block = 0;
            }
        }
        blocks[chunk % 2 * PIECES_OF_CHUNK + lane_index()] = block;
    }

    // Bytes of K and V of a head of a block.
    DEVICE size_t head_bytes() const {
        const size_t codes = size_t(batch.block_size) * batch.head_dim * UNIT;
        return codes + (Kv::IS_QUANTIZED ? batch.block_size * 8 : 0);
    }

    // Tokens of one block. Of a piece that nobody sees nothing is copied.
    struct Piece {
        const uint8_t* head;
        uint32_t offset;
        unsigned copied;
    };

    DEVICE Piece piece_at(uint32_t position) const {
        const bool is_seen = position < end && position + PIECE > start;
        const uint32_t block = blocks[position / PIECE % (2 * PIECES_OF_CHUNK)];
        const size_t head = is_seen ? (size_t(block) * batch.num_kv_heads + kv_head) * head_bytes() : 0;
        return {batch.kv + head, is_seen ? position % batch.block_size : 0, is_seen ? 16u : 0u};
    }

    // Starts the copies of a tile.
    DEVICE void load(uint32_t tile_start, int slot) const {
        uint8_t* k_to = ring + slot * SLOT_BYTES;
        uint8_t* v_to = k_to + K_BYTES;
        const Piece pieces[2] = {piece_at(tile_start), piece_at(tile_start + PIECE)};
        constexpr uint32_t UNITS = 16 / UNIT;
        // K: rows of pairs of dimensions, 16 tokens of a row side by side.
        constexpr uint32_t K_CHUNKS = TILE / UNITS;
        for (uint32_t index = threadIdx.x; index < batch.head_dim / 2 * K_CHUNKS; index += THREADS) {
            const uint32_t dim_pair = index / K_CHUNKS;
            const uint32_t token = index % K_CHUNKS * UNITS;
            const Piece piece = token < PIECE ? pieces[0] : pieces[1];
            const size_t at = size_t(dim_pair) * batch.block_size + piece.offset + token % PIECE;
            copy_async_16_or_zeros(k_to + k_at(dim_pair, token), piece.head + at * UNIT, piece.copied);
        }
        // V: rows of pairs of tokens, all dimensions of a row side by side.
        const size_t v_first = size_t(batch.block_size) / 2 * batch.head_dim;
        constexpr uint32_t V_CHUNKS = HEAD_DIM / UNITS;
        if (batch.head_dim % UNITS == 0) {
            for (uint32_t index = threadIdx.x; index < TILE / 2 * V_CHUNKS; index += THREADS) {
                const uint32_t token_pair = index / V_CHUNKS;
                const uint32_t dim = index % V_CHUNKS * UNITS;
                const Piece piece = token_pair < PIECE / 2 ? pieces[0] : pieces[1];
                if (dim < batch.head_dim) {
                    const uint32_t row = piece.offset / 2 + token_pair % (PIECE / 2);
                    const size_t at = v_first + size_t(row) * batch.head_dim + dim;
                    copy_async_16_or_zeros(v_to + v_at(token_pair, dim), piece.head + at * UNIT, piece.copied);
                }
            }
        } else {
            // Rows that do not start at multiples of 16 bytes.
            for (uint32_t index = threadIdx.x; index < TILE / 2 * batch.head_dim; index += THREADS) {
                const uint32_t token_pair = index / batch.head_dim;
                const uint32_t dim = index % batch.head_dim;
                const Piece piece = token_pair < PIECE / 2 ? pieces[0] : pieces[1];
                const uint32_t row = piece.offset / 2 + token_pair % (PIECE / 2);
                const uint8_t* from = piece.head + (v_first + size_t(row) * batch.head_dim + dim) * UNIT;
                uint8_t* to = v_to + v_at(token_pair, dim);
                UNROLL
                for (int half = 0; half < UNIT / 2; ++half) {
                    const uint16_t bits = piece.copied ? reinterpret_cast<const uint16_t*>(from)[half] : 0;
                    reinterpret_cast<uint16_t*>(to)[half] = bits;
                }
            }
        }
        if (Kv::IS_QUANTIZED && threadIdx.x < 2 * TILE / 4) {
            const uint32_t part = threadIdx.x / (TILE / 4);
            const uint32_t token = threadIdx.x % (TILE / 4) * 4;
            const Piece piece = token < PIECE ? pieces[0] : pieces[1];
            const uint8_t* scales = piece.head + size_t(batch.block_size) * batch.head_dim * UNIT;
            const uint32_t at = part * batch.block_size + piece.offset + token % PIECE;
            copy_async_16_or_zeros(v_to + V_BYTES + (part * TILE + token) * 4, scales + at * 4, piece.copied);
        }
    }

    // Replaces numbers of V that are not finite by zeros, and remembers their tokens.
    DEVICE void clean(int slot) const {
        if (threadIdx.x == 0) {
            *bad_tokens = 0;
        }
        __syncthreads();
        uint8_t* v = ring + slot * SLOT_BYTES + K_BYTES;
        if (Kv::IS_QUANTIZED) {
            if (threadIdx.x < TILE) {
                float* scale = reinterpret_cast<float*>(v + V_BYTES) + TILE + threadIdx.x;
                if (!(fabsf(*scale) < __builtin_huge_valf())) {
                    *scale = 0.0f;
                    atomicOr(bad_tokens, 1u << threadIdx.x);
                }
            }
        } else {
            uint32_t* pairs = reinterpret_cast<uint32_t*>(v);
            for (uint32_t index = threadIdx.x; index < TILE / 2 * HEAD_DIM; index += THREADS) {
                const uint32_t pair = pairs[index];
                const bool is_low_bad = (pair & 0x7f80u) == 0x7f80u;
                const bool is_high_bad = (pair & 0x7f800000u) == 0x7f800000u;
                if (is_low_bad || is_high_bad) {
                    pairs[index] = pair & (is_low_bad ? 0xffff0000u : ~0u) & (is_high_bad ? 0xffffu : ~0u);
                    const uint32_t bad = (is_low_bad ? 1u : 0u) | (is_high_bad ? 2u : 0u);
                    atomicOr(bad_tokens, bad << (index / HEAD_DIM * 2));
                }
            }
        }
        __syncthreads();
    }
};

}  // namespace
