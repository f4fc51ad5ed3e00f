// Rows of queries over tiles of their context: scores, the running softmax, sums of V, and merging of chunks.
#pragma once

#include "exp2.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "tiles.cuh"
#include "units.cuh"
#include "warp.cuh"

namespace {

// Two numbers to bf16, and, where `PARTS` is two, what that leaves of them.
template <int PARTS>
DEVICE void split_pair(float low, float high, uint32_t (&parts)[PARTS]) {
    parts[0] = floats_to_bf16_pair(low, high);
    if (PARTS > 1) {
        parts[PARTS - 1] = floats_to_bf16_pair(low - bf16_low(parts[0]), high - bf16_high(parts[0]));
    }
}

// Maximum (of scores in powers of two), sum and numbers of chunks so far, and of one more chunk.
struct Merge {
    float first;
    float second;
    bool takes_first;
    bool takes_second;

    // A chunk of which a row sees nothing changes nothing. One with scores that are no numbers has a sum that is none.
    DEVICE Merge(float &max, float chunk_max, float chunk_sum) {
        takes_first = chunk_max == NONE && chunk_sum == 0.0f;
        takes_second = !takes_first && max == NONE;
        const float new_max = fmaxf(max, chunk_max);
        first = exp2_approximate(max - new_max);
        second = exp2_approximate(chunk_max - new_max);
        max = new_max;
    }

    DEVICE float operator()(float x, float of_chunk) const {
        const float both = fmaf(of_chunk, second, x * first);
        return takes_first ? x : takes_second ? of_chunk : both;
    }
};

// Numbers from the scores of a row of a tile to the next in shared memory, where warps exchange them.
constexpr uint32_t SCORES_STRIDE = TILE + 4;

// Rows over caches of `Kv` with heads of at most `HEAD_DIM` dimensions. `SHARERS` warps share 16 rows, each with a part of
// the dimensions of V. If these are all warps, each also has a part of a tile's tokens, and they exchange scores.
template <class Kv, int HEAD_DIM, int SHARERS>
struct Rows {
    static constexpr bool EXCHANGES = SHARERS == WARPS;
    static constexpr uint32_t ROWS = 16 * WARPS / SHARERS;
    static constexpr int Q_STEPS = HEAD_DIM / 16;
    static constexpr int DIM_TILES = HEAD_DIM / 8 / SHARERS;
    static constexpr int TOKEN_TILES = TILE / 8;
    static constexpr int PARTS = Kv::PARTS;

    using KvTiles = Tiles<Kv, HEAD_DIM>;
    static constexpr int STAGES = KvTiles::STAGES;

    KvTiles tiles;
    // [16 rows][16 dimensions][part][lane] fragments.
    uint8_t* queries;
    // [16][SCORES_STRIDE], where warps exchange.
    float* exchange;
    Seq seq;
    uint32_t first_row;
    uint32_t num_rows;

    // Results of a lane for rows `lane / 4` and `lane / 4 + 8` of its warp.
    float max[2];
    float sum[2];
    float numbers[DIM_TILES][4];

    DEVICE static int row_group() { return warp_index() / SHARERS; }
    DEVICE static int first_dim_tile() { return warp_index() % SHARERS * DIM_TILES; }
    // Position of the token of a row of the unit.
    DEVICE uint32_t position_of(uint32_t row) const {
        return seq.first_position() + (first_row + row) / tiles.batch.group_len();
    }

    // Queries of this warp's rows, as fragments; zeros where there is no row or dimension.
    DEVICE void load_queries() const {
        const uint32_t lane = lane_index();
        const uint32_t qkv_len = (tiles.batch.num_heads + 2 * tiles.batch.num_kv_heads) * tiles.batch.head_dim;
        const float* from[2];
        bool has_row[2];
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = row_group() * 16 + half * 8 + lane / 4;
            has_row[half] = row < num_rows;
            const uint32_t of_unit = has_row[half] ? first_row + row : first_row;
            const uint32_t token = seq.first_token + of_unit / tiles.batch.group_len();
            const uint32_t head = tiles.kv_head * tiles.batch.group_len() + of_unit % tiles.batch.group_len();
            from[half] = tiles.batch.qkv + size_t(token) * qkv_len + head * tiles.batch.head_dim;
        }
        for (int step = warp_index() % SHARERS; step < Q_STEPS; step += SHARERS) {
            Bytes16 fragments[PARTS];
            UNROLL
            for (int word = 0; word < 4; ++word) {
                const uint32_t dim = step * 16 + word / 2 * 8 + lane % 4 * 2;
                const bool is_there = has_row[word % 2] && dim < tiles.batch.head_dim;
                const float low = is_there ? from[word % 2][dim] : 0.0f;
                const float high = is_there ? from[word % 2][dim + 1] : 0.0f;
                uint32_t parts[PARTS];
                split_pair<PARTS>(low, high, parts);
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    fragments[part].word[word] = parts[part];
                }
            }
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                store_16(query_at(step, part), fragments[part]);
            }
        }
    }

    DEVICE uint8_t* query_at(int step, int part) const {
        return queries + (((row_group() * Q_STEPS + step) * PARTS + part) * 32 + lane_index()) * 16;
    }

    // Scores of this warp's rows and a tile, in powers of two.
    DEVICE void score(int slot, uint32_t tile_start, bool is_whole, const uint32_t (&first)[2], const uint32_t (&last)[2],
                      float (&scores)[TOKEN_TILES][4]) const {
        constexpr int OWN_TILES = EXCHANGES ? TOKEN_TILES / WARPS : TOKEN_TILES;
        const int first_tile = EXCHANGES ? warp_index() * OWN_TILES : 0;
        const uint32_t lane = lane_index();
        const uint8_t* k = tiles.ring + slot * KvTiles::SLOT_BYTES;
        float own[OWN_TILES][4];
        UNROLL
        for (int tile = 0; tile < OWN_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                own[tile][i] = 0.0f;
            }
        }
        UNROLL
        for (int step = 0; step < Q_STEPS; ++step) {
            Bytes16 q[PARTS];
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                q[part] = load_16(query_at(step, part));
            }
            UNROLL
            for (int tile = 0; tile < OWN_TILES; ++tile) {
                const uint32_t token = (first_tile + tile) * 8 + lane / 4;
                const uint32_t b[2] = {Kv::pair(k + KvTiles::k_at(step * 8 + lane % 4, token)),
                                       Kv::pair(k + KvTiles::k_at(step * 8 + 4 + lane % 4, token))};
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    mma_m16n8k16_bf16(own[tile], q[part].word, b);
                }
            }
        }
        const float* scales = reinterpret_cast<const float*>(k + KvTiles::K_BYTES + KvTiles::V_BYTES);
        const float factor = tiles.batch.scale * 1.44269504f;
        UNROLL
        for (int tile = 0; tile < OWN_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint32_t token = (first_tile + tile) * 8 + lane % 4 * 2 + i % 2;
                float score = own[tile][i] * factor;
                if (Kv::IS_QUANTIZED) {
                    score *= scales[token];
                }
                const uint32_t position = tile_start + token;
                const bool is_seen = is_whole || (position >= first[i / 2] && position < last[i / 2]);
                own[tile][i] = is_seen ? score : NONE;
                if (EXCHANGES) {
                    exchange[(lane / 4 + i / 2 * 8) * SCORES_STRIDE + token] = own[tile][i];
                }
            }
        }
        if (EXCHANGES) {
            __syncthreads();
        }
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint32_t token = tile * 8 + lane % 4 * 2 + i % 2;
                scores[tile][i] = EXCHANGES ? exchange[(lane / 4 + i / 2 * 8) * SCORES_STRIDE + token]
                                            : own[tile % OWN_TILES][i];
            }
        }
    }

    // Adds a tile to the chunk's results.
    DEVICE void attend(int slot, uint32_t tile_start, bool is_whole, const uint32_t (&first)[2], const uint32_t (&last)[2],
                       float (&chunk_max)[2], float (&chunk_sum)[4], float (&chunk)[DIM_TILES][4]) const {
        const uint32_t lane = lane_index();
        float scores[TOKEN_TILES][4];
        score(slot, tile_start, is_whole, first, last, scores);
        float shift[2];
        float shrink[2];
        bool has_grown = false;
        UNROLL
        for (int half = 0; half < 2; ++half) {
            float largest = NONE;
            UNROLL
            for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                largest = fmaxf(largest, fmaxf(scores[tile][2 * half], scores[tile][2 * half + 1]));
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            const float new_max = fmaxf(chunk_max[half], largest);
            // A row that has seen nothing yet has no probabilities either.
            shift[half] = new_max == NONE ? 0.0f : new_max;
            shrink[half] = exp2_approximate(chunk_max[half] - shift[half]);
            has_grown = has_grown || new_max != chunk_max[half];
            chunk_max[half] = new_max;
        }
        // Where no maximum grew, factors are 1.
        if (__any_sync(ALL_LANES, has_grown)) {
            UNROLL
            for (int tile = 0; tile < DIM_TILES; ++tile) {
                UNROLL
                for (int i = 0; i < 4; ++i) {
                    chunk[tile][i] *= shrink[i / 2];
                }
            }
            UNROLL
            for (int i = 0; i < 4; ++i) {
                chunk_sum[i] *= shrink[i / 2];
            }
        }
        const uint8_t* v = tiles.ring + slot * KvTiles::SLOT_BYTES + KvTiles::K_BYTES;
        const float* v_scales = reinterpret_cast<const float*>(v + KvTiles::V_BYTES) + TILE;
        UNROLL
        for (int step = 0; step < TOKEN_TILES / 2; ++step) {
            // Probabilities of 16 tokens as fragments: what a lane has of two tiles of scores is what it needs.
            uint32_t weights[PARTS][4];
            uint32_t probabilities[PARTS][4];
            UNROLL
            for (int word = 0; word < 4; ++word) {
                const int tile = step * 2 + word / 2;
                const int half = word % 2;
                const float low = exp2_approximate(scores[tile][2 * half] - shift[half]);
                const float high = exp2_approximate(scores[tile][2 * half + 1] - shift[half]);
                uint32_t parts[PARTS];
                split_pair<PARTS>(low, high, parts);
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    probabilities[part][word] = parts[part];
                    weights[part][word] = parts[part];
                }
                if (Kv::IS_QUANTIZED) {
                    const float* scale = v_scales + tile * 8 + lane % 4 * 2;
                    split_pair<PARTS>(low * scale[0], high * scale[1], parts);
                    UNROLL
                    for (int part = 0; part < PARTS; ++part) {
                        weights[part][word] = parts[part];
                    }
                }
            }
            const uint32_t ones[2] = {0x3f803f80u, 0x3f803f80u};
            UNROLL
            for (int part = 0; part < PARTS; ++part) {
                mma_m16n8k16_bf16(chunk_sum, probabilities[part], ones);
            }
            UNROLL
            for (int tile = 0; tile < DIM_TILES; ++tile) {
                const uint32_t dim = (first_dim_tile() + tile) * 8 + lane / 4;
                const uint32_t b[2] = {Kv::pair(v + KvTiles::v_at(step * 8 + lane % 4, dim)),
                                       Kv::pair(v + KvTiles::v_at(step * 8 + 4 + lane % 4, dim))};
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    mma_m16n8k16_bf16(chunk[tile], weights[part], b);
                }
            }
        }
    }

    // Goes through all tiles that rows of the unit see. The results are in `max`, `sum` and `numbers` then.
    DEVICE void run() {
        const uint32_t lane = lane_index();
        const uint32_t first_chunk = tiles.start / CHUNK;
        const uint32_t first_tile = tiles.start / TILE * TILE;
        if (warp_index() < 2) {
            tiles.find_blocks(first_chunk + warp_index());
        }
        __syncthreads();
        UNROLL
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
            if (first_tile + ahead * TILE < tiles.end) {
                tiles.load(first_tile + ahead * TILE, ahead);
            }
            commit_copies();
        }
        load_queries();

        // What this lane's rows see, and what all rows of the unit do.
        uint32_t first[2];
        uint32_t last[2];
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = row_group() * 16 + half * 8 + lane / 4;
            const bool is_there = row < num_rows;
            const uint32_t position = position_of(is_there ? row : 0);
            first[half] = tiles.batch.first_visible(position);
            last[half] = is_there ? position + 1 : 0;
            max[half] = NONE;
            sum[half] = 0.0f;
        }
        const uint32_t all_first = tiles.batch.first_visible(position_of(num_rows - 1));
        const uint32_t all_last = position_of(0) + 1;
        const bool is_at_work = row_group() * 16 < num_rows;

        float chunk_max[2] = {NONE, NONE};
        float chunk_sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float chunk[DIM_TILES][4];
        UNROLL
        for (int tile = 0; tile < DIM_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                chunk[tile][i] = 0.0f;
                numbers[tile][i] = 0.0f;
            }
        }
        int slot = 0;
        for (uint32_t tile_start = first_tile; tile_start < tiles.end; tile_start += TILE) {
            wait_copies<STAGES - 2>();
            // All copies of this tile are there, and nobody reads the tile before any more.
            __syncthreads();
            if (tile_start % CHUNK == 0 && tile_start > first_tile && warp_index() == WARPS - 1) {
                // In place of the chunk before: copies are never a whole chunk behind.
                tiles.find_blocks(tile_start / CHUNK + 1);
            }
            const uint32_t next = tile_start + (STAGES - 1) * TILE;
            if (next < tiles.end) {
                tiles.load(next, slot == 0 ? STAGES - 1 : slot - 1);
            }
            commit_copies();
            const bool is_whole = tile_start >= all_first && tile_start + TILE <= all_last;
            if (!is_whole) {
                tiles.clean(slot);
            }
            if (is_at_work) {
                attend(slot, tile_start, is_whole, first, last, chunk_max, chunk_sum, chunk);
                if (!is_whole && *tiles.bad_tokens != 0) {
                    UNROLL
                    for (int half = 0; half < 2; ++half) {
                        for (uint32_t token = 0; token < TILE; ++token) {
                            const uint32_t position = tile_start + token;
                            const bool is_seen = position >= first[half] && position < last[half];
                            if (is_seen && (*tiles.bad_tokens >> token & 1) != 0) {
                                chunk_sum[2 * half] = __uint_as_float(0x7fffffffu);
                            }
                        }
                    }
                }
                if ((tile_start + TILE) % CHUNK == 0 || tile_start + TILE >= tiles.end) {
                    UNROLL
                    for (int half = 0; half < 2; ++half) {
                        const Merge merge(max[half], chunk_max[half], chunk_sum[2 * half]);
                        sum[half] = merge(sum[half], chunk_sum[2 * half]);
                        UNROLL
                        for (int tile = 0; tile < DIM_TILES; ++tile) {
                            UNROLL
                            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                                numbers[tile][i] = merge(numbers[tile][i], chunk[tile][i]);
                                chunk[tile][i] = 0.0f;
                            }
                        }
                        chunk_max[half] = NONE;
                        chunk_sum[2 * half] = 0.0f;
                        chunk_sum[2 * half + 1] = 0.0f;
                    }
                }
            }
            slot = slot + 1 == STAGES ? 0 : slot + 1;
        }
    }

    // Where the output of a row of the unit lies.
    DEVICE float* out_of(uint32_t row) const {
        const uint32_t token = seq.first_token + (first_row + row) / tiles.batch.group_len();
        const uint32_t head = tiles.kv_head * tiles.batch.group_len() + (first_row + row) % tiles.batch.group_len();
        return tiles.batch.out + (size_t(token) * tiles.batch.num_heads + head) * tiles.batch.head_dim;
    }

    DEVICE void write() const {
        const uint32_t lane = lane_index();
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = row_group() * 16 + half * 8 + lane / 4;
            if (row >= num_rows) {
                continue;
            }
            float* out = out_of(row);
            UNROLL
            for (int tile = 0; tile < DIM_TILES; ++tile) {
                const uint32_t dim = (first_dim_tile() + tile) * 8 + lane % 4 * 2;
                if (dim < tiles.batch.head_dim) {
                    out[dim] = numbers[tile][2 * half] / sum[half];
                    out[dim + 1] = numbers[tile][2 * half + 1] / sum[half];
                }
            }
        }
    }

    // A row's partial result of one chunk.
    DEVICE float* state_of(uint32_t partial_start, uint32_t chunk, uint32_t row) const {
        const size_t of_head = size_t(tiles.kv_head) * seq.num_chunks() + chunk;
        return tiles.batch.partials + (partial_start + of_head * num_rows + row) * (HEAD_DIM + STATE_TAIL);
    }

    // Leaves the results of a chunk in memory; the last to do so merges those of all.
    DEVICE void write_part(uint32_t partial_start, uint32_t chunk, uint32_t* arrivals, uint32_t* is_last) const {
        const uint32_t lane = lane_index();
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = row_group() * 16 + half * 8 + lane / 4;
            if (row >= num_rows) {
                continue;
            }
            float* state = state_of(partial_start, chunk, row);
            UNROLL
            for (int tile = 0; tile < DIM_TILES; ++tile) {
                const uint32_t dim = (first_dim_tile() + tile) * 8 + lane % 4 * 2;
                state[dim] = numbers[tile][2 * half];
                state[dim + 1] = numbers[tile][2 * half + 1];
            }
            if (first_dim_tile() == 0 && lane % 4 == 0) {
                state[HEAD_DIM] = max[half];
                state[HEAD_DIM + 1] = sum[half];
            }
        }
        // What all threads wrote is there before the count says so.
        __syncthreads();
        if (threadIdx.x == 0) {
            *is_last = add_acquire_release(arrivals, 1) + 1 == seq.num_chunks();
            if (*is_last) {
                // As it was found, for the next launch.
                *arrivals = 0;
            }
        }
        __syncthreads();
        if (!*is_last) {
            return;
        }
        constexpr uint32_t QUADS = HEAD_DIM / 4;
        for (uint32_t index = threadIdx.x; index < num_rows * QUADS; index += THREADS) {
            const uint32_t row = index / QUADS;
            const uint32_t dim = index % QUADS * 4;
            float all_max = NONE;
            float all_sum = 0.0f;
            float all[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            for (uint32_t of = 0; of < seq.num_chunks(); ++of) {
                const float* state = state_of(partial_start, of, row);
                const float4 part = load_float4(state + dim);
                const Merge merge(all_max, state[HEAD_DIM], state[HEAD_DIM + 1]);
                all_sum = merge(all_sum, state[HEAD_DIM + 1]);
                all[0] = merge(all[0], part.x);
                all[1] = merge(all[1], part.y);
                all[2] = merge(all[2], part.z);
                all[3] = merge(all[3], part.w);
            }
            float* out = out_of(row);
            UNROLL
            for (int i = 0; i < 4; ++i) {
                if (dim + i < tiles.batch.head_dim) {
                    out[dim + i] = all[i] / all_sum;
                }
            }
        }
    }
};

}  // namespace
