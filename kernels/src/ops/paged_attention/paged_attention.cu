// Causal attention of new tokens over their paged context: decodes and chunks of prompts in one launch.
//
// The queries of a KV head's group are rows of one matrix: row r is head `r % group_len` of new token `r / group_len`. A
// unit of work is up to 64 rows (32 where heads are wide) of a sequence and KV head: over all of their context, or, where
// they are 16 at most and there is room for partial results, over one chunk of 512 positions. Thread blocks of four warps
// take units by tickets until there are none, so a launch has one grid whatever is in the batch; each of them reckons the
// list of units by itself from the lengths.
//
// A warp owns 16 rows. Where there are no more, warp 0 computes and the others help to copy, which is enough to wait for
// memory: a tile of 32 tokens with heads of 128 takes a warp some 1,300 cycles, so that two thread blocks on a
// multiprocessor could read 40 GB/s more than its share of an H200's 4.3 TB/s, which is 32 bytes a nanosecond.
//
// Shared memory: a ring of tiles of 32 tokens, K and V as they lie in the cache (see `KvLayout`: pairs of dimensions by
// tokens, then pairs of tokens by dimensions), which are B fragments word by word. Pieces of 32 bytes are exchanged so that
// the four words of a fragment's row lie in different banks. cp.async keeps all tiles but one on their way: 48 KiB with
// heads of 128, twice that with two thread blocks, where latency times bandwidth asks for 26 KiB.
//
// Order of operations, of every row for itself: tiles in ascending order with a running maximum (online softmax), sums of
// products by chains of matrix instructions; from zero again at each multiple of 512; results of chunks merged in
// ascending order, from registers or, by the last of the thread blocks that had one each, from memory. A tile that a row
// does not see changes no bit of it, so neither batch nor chunk of the prompt does. Probabilities are summed as they are
// multiplied, rounded to bf16, by a product with ones.
//
// bf16: queries and probabilities are rounded to bf16. int8: both are kept as the sum of two bf16 numbers; codes are exact
// in bf16; the scale of a token multiplies its score, and its probability before V. f32: plain multiplications, a warp a
// row.
//
// What may not be looked at does no harm: scores past a row's context are replaced, whatever they are. Where not every row
// sees all of a tile, numbers of V that are not finite are replaced by zeros and their tokens remembered; a row that sees
// one of these is NaN.
//
// Paged attention: Kwon et al. 2023. Online softmax: Milakov and Gimelshein 2018. Rows of a group: FlashInfer (Ye et al. 2025).

#include "async_copy.cuh"
#include "exp2.cuh"
#include "fault.cuh"
#include "memory.cuh"
#include "mma.cuh"
#include "numbers.cuh"
#include "warp.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr uint32_t TILE = 32;
constexpr uint32_t CHUNK = 512;
// Tokens that certainly lie in one block.
constexpr uint32_t PIECE = 16;
constexpr uint32_t PIECES_OF_CHUNK = CHUNK / PIECE;
// Of one launch.
constexpr uint32_t MAX_SEQS = 1024;
// Rows of a unit that is one of several.
constexpr uint32_t SPLIT_ROWS = 16;
// After the numbers of a partial result: maximum, sum, nothing.
constexpr uint32_t STATE_TAIL = 4;
constexpr float NONE = -__builtin_huge_valf();

// What the launcher hands over.
struct Batch {
    const float* qkv;
    const uint8_t* kv;
    float* out;
    const uint32_t* cu_seqlens_q;
    const uint32_t* context_lens;
    const uint32_t* rows;
    const uint32_t* block_tables;
    float* partials;
    uint32_t* counters;
    uint32_t num_tokens;
    uint32_t num_seqs;
    uint32_t num_heads;
    uint32_t num_kv_heads;
    uint32_t head_dim;
    uint32_t block_size;
    uint32_t num_blocks;
    uint32_t max_num_blocks;
    uint32_t num_table_rows;
    uint32_t window;
    uint32_t num_partial_rows;
    float scale;
    uint32_t* context_fault;
    uint32_t* rows_fault;
    uint32_t* tables_fault;

    DEVICE uint32_t group_len() const { return num_heads / num_kv_heads; }

    // First position that a token sees.
    DEVICE uint32_t first_visible(uint32_t position) const {
        return window != 0 && position + 1 > window ? position + 1 - window : 0;
    }
};

struct Seq {
    uint32_t first_token;
    uint32_t q_len;
    uint32_t context_len;
    uint32_t first_chunk;
    uint32_t end_chunk;

    DEVICE uint32_t first_position() const { return context_len - q_len; }
    DEVICE uint32_t num_chunks() const { return end_chunk - first_chunk; }
};

// A sequence without new tokens where something does not fit; what, is reported.
DEVICE Seq seq_of(const Batch &batch, uint32_t index) {
    Seq seq = {0, 0, 0, 0, 0};
    const uint32_t start = batch.cu_seqlens_q[index];
    const uint32_t end = batch.cu_seqlens_q[index + 1];
    const uint32_t context_len = batch.context_lens[index];
    if (end == start) {
        return seq;
    }
    if (end < start || end > batch.num_tokens || context_len < end - start ||
        context_len > batch.max_num_blocks * batch.block_size) {
        report_fault(batch.context_fault, context_len, batch.max_num_blocks * batch.block_size + 1);
        return seq;
    }
    if (batch.rows[index] >= batch.num_table_rows) {
        report_fault(batch.rows_fault, batch.rows[index], batch.num_table_rows);
        return seq;
    }
    seq.first_token = start;
    seq.q_len = end - start;
    seq.context_len = context_len;
    seq.first_chunk = batch.first_visible(seq.first_position()) / CHUNK;
    seq.end_chunk = (context_len + CHUNK - 1) / CHUNK;
    return seq;
}

// Units of all sequences, the last first: prompts lie behind decodes and take longest.
struct UnitList {
    // Of the sequences in that order; the end behind them.
    uint32_t* starts;
    // First row of partial results of a sequence that is split, else NO_SPLIT.
    uint32_t* partial_starts;
};

constexpr uint32_t NO_SPLIT = 0xffffffffu;

// Sum of `x` over lower threads; `total` gets that of all.
DEVICE uint32_t block_sum_below(uint32_t x, uint32_t* of_warps, uint32_t &total) {
    const uint32_t up_to = warp_running_sum(x);
    if (lane_index() == 31) {
        of_warps[warp_index()] = up_to;
    }
    __syncthreads();
    uint32_t below = up_to - x;
    total = 0;
    for (uint32_t warp = 0; warp < WARPS; ++warp) {
        below += warp < warp_index() ? of_warps[warp] : 0;
        total += of_warps[warp];
    }
    __syncthreads();
    return below;
}

template <uint32_t ROWS>
DEVICE void list_units(const Batch &batch, const UnitList &list, uint32_t* of_warps) {
    const uint32_t share = (batch.num_seqs + THREADS - 1) / THREADS;
    const uint32_t first = min(threadIdx.x * share, batch.num_seqs);
    const uint32_t end = min(first + share, batch.num_seqs);
    const auto rows_of = [&](const Seq &seq) { return seq.q_len * batch.group_len(); };
    const auto partial_rows_of = [&](const Seq &seq) {
        const bool can_split = rows_of(seq) <= SPLIT_ROWS && seq.num_chunks() > 1;
        return can_split ? seq.num_chunks() * batch.num_kv_heads * rows_of(seq) : 0;
    };
    uint32_t num_partials = 0;
    for (uint32_t place = first; place < end; ++place) {
        num_partials += partial_rows_of(seq_of(batch, batch.num_seqs - 1 - place));
    }
    uint32_t total;
    uint32_t partial_start = block_sum_below(num_partials, of_warps, total);
    uint32_t num_units = 0;
    for (uint32_t place = first; place < end; ++place) {
        const Seq seq = seq_of(batch, batch.num_seqs - 1 - place);
        const uint32_t partial_rows = partial_rows_of(seq);
        const bool is_split = partial_rows > 0 && partial_start + partial_rows <= batch.num_partial_rows;
        list.partial_starts[place] = is_split ? partial_start : NO_SPLIT;
        partial_start += partial_rows;
        const uint32_t parts = is_split ? seq.num_chunks() : (rows_of(seq) + ROWS - 1) / ROWS;
        // A count for now.
        list.starts[place] = parts * batch.num_kv_heads;
        num_units += list.starts[place];
    }
    uint32_t start = block_sum_below(num_units, of_warps, total);
    for (uint32_t place = first; place < end; ++place) {
        const uint32_t count = list.starts[place];
        list.starts[place] = start;
        start += count;
    }
    if (threadIdx.x == 0) {
        list.starts[batch.num_seqs] = total;
    }
    __syncthreads();
}

// How numbers lie in the cache: a unit is a pair of them.
struct Bf16 {
    static constexpr int UNIT_BYTES = 4;
    static constexpr bool IS_QUANTIZED = false;
    // Parts that a query or probability is the sum of.
    static constexpr int PARTS = 1;

    DEVICE static uint32_t pair(const uint8_t* from) { return* reinterpret_cast<const uint32_t*>(from); }
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

// Attention over caches of `Kv` with heads of at most `HEAD_DIM` dimensions.
template <class Kv, int HEAD_DIM>
struct Attention {
    // Warps that share 16 rows, each with a part of the dimensions of V.
    static constexpr int SHARERS = HEAD_DIM > 128 ? 2 : 1;
    static constexpr uint32_t ROWS = 16 * WARPS / SHARERS;
    static constexpr int STAGES = HEAD_DIM > 128 ? 2 : 4;
    static constexpr int Q_STEPS = HEAD_DIM / 16;
    static constexpr int DIM_TILES = HEAD_DIM / 8 / SHARERS;
    static constexpr int TOKEN_TILES = TILE / 8;
    static constexpr int PARTS = Kv::PARTS;
    static constexpr int UNIT = Kv::UNIT_BYTES;
    static constexpr int K_BYTES = HEAD_DIM / 2 * TILE * UNIT;
    static constexpr int V_BYTES = TILE / 2 * HEAD_DIM * UNIT;
    static constexpr int SCALE_BYTES = Kv::IS_QUANTIZED ? 2 * TILE * 4 : 0;
    static constexpr int SLOT_BYTES = K_BYTES + V_BYTES + SCALE_BYTES;

    const Batch &batch;
    // [STAGES] of K, V, scales; then queries, [16 rows][16 dimensions][part][lane] fragments.
    uint8_t* ring;
    uint8_t* queries;
    // Blocks of two chunks, by pieces.
    uint32_t* blocks;
    // Of the tile at hand, tokens with numbers that are not finite.
    uint32_t* bad_tokens;

    // The unit.
    Seq seq;
    uint32_t kv_head;
    uint32_t first_row;
    uint32_t num_rows;
    // Positions that some row sees.
    uint32_t start;
    uint32_t end;
    const uint32_t* table;

    // Results of a lane for rows `lane / 4` and `lane / 4 + 8` of its warp.
    float max[2];
    float sum[2];
    float numbers[DIM_TILES][4];

    DEVICE static int row_group() { return warp_index() / SHARERS; }
    DEVICE static int first_dim_tile() { return warp_index() % SHARERS * DIM_TILES; }
    DEVICE static uint32_t swizzle(uint32_t row) { return (row & 3) * 8 * UNIT; }
    DEVICE static uint32_t k_at(uint32_t dim_pair, uint32_t token) {
        return dim_pair * TILE * UNIT + (token * UNIT ^ swizzle(dim_pair));
    }
    DEVICE static uint32_t v_at(uint32_t token_pair, uint32_t dim) {
        return token_pair * HEAD_DIM * UNIT + (dim * UNIT ^ swizzle(token_pair));
    }

    // Position of the token of a row of the unit.
    DEVICE uint32_t position_of(uint32_t row) const {
        return seq.first_position() + (first_row + row) / batch.group_len();
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

    // Queries of this warp's rows, as fragments; zeros where there is no row or dimension.
    DEVICE void load_queries() const {
        if (warp_index() % SHARERS != 0) {
            return;
        }
        const uint32_t lane = lane_index();
        const uint32_t qkv_len = (batch.num_heads + 2 * batch.num_kv_heads) * batch.head_dim;
        const float* from[2];
        bool has_row[2];
        UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = row_group() * 16 + half * 8 + lane / 4;
            has_row[half] = row < num_rows;
            const uint32_t of_unit = has_row[half] ? first_row + row : first_row;
            const uint32_t token = seq.first_token + of_unit / batch.group_len();
            const uint32_t head = kv_head * batch.group_len() + of_unit % batch.group_len();
            from[half] = batch.qkv + size_t(token) * qkv_len + head * batch.head_dim;
        }
        for (int step = 0; step < Q_STEPS; ++step) {
            Bytes16 fragments[PARTS];
            UNROLL
            for (int word = 0; word < 4; ++word) {
                const uint32_t dim = step * 16 + word / 2 * 8 + lane % 4 * 2;
                const bool is_there = has_row[word % 2] && dim < batch.head_dim;
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

    // Scores of this warp's rows and a tile, in powers of two.
    DEVICE void score(int slot, uint32_t tile_start, bool is_whole, const uint32_t (&first)[2], const uint32_t (&last)[2],
                      float (&scores)[TOKEN_TILES][4]) const {
        const uint32_t lane = lane_index();
        const uint8_t* k = ring + slot * SLOT_BYTES;
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                scores[tile][i] = 0.0f;
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
            for (int tile = 0; tile < TOKEN_TILES; ++tile) {
                const uint32_t token = tile * 8 + lane / 4;
                const uint32_t b[2] = {Kv::pair(k + k_at(step * 8 + lane % 4, token)),
                                       Kv::pair(k + k_at(step * 8 + 4 + lane % 4, token))};
                UNROLL
                for (int part = 0; part < PARTS; ++part) {
                    mma_m16n8k16_bf16(scores[tile], q[part].word, b);
                }
            }
        }
        const float* scales = reinterpret_cast<const float*>(k + K_BYTES + V_BYTES);
        // Scores are in powers of two.
        const float factor = batch.scale * 1.44269504f;
        UNROLL
        for (int tile = 0; tile < TOKEN_TILES; ++tile) {
            UNROLL
            for (int i = 0; i < 4; ++i) {
                const uint32_t token = tile * 8 + lane % 4 * 2 + i % 2;
                float score = scores[tile][i] * factor;
                if (Kv::IS_QUANTIZED) {
                    score *= scales[token];
                }
                const uint32_t position = tile_start + token;
                const bool is_seen = is_whole || (position >= first[i / 2] && position < last[i / 2]);
                scores[tile][i] = is_seen ? score : NONE;
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
        const uint8_t* v = ring + slot * SLOT_BYTES + K_BYTES;
        const float* v_scales = reinterpret_cast<const float*>(v + V_BYTES) + TILE;
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
                const uint32_t b[2] = {Kv::pair(v + v_at(step * 8 + lane % 4, dim)),
                                       Kv::pair(v + v_at(step * 8 + 4 + lane % 4, dim))};
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
        const uint32_t first_chunk = start / CHUNK;
        const uint32_t first_tile = start / TILE * TILE;
        if (warp_index() < 2) {
            find_blocks(first_chunk + warp_index());
        }
        __syncthreads();
        UNROLL
        for (int ahead = 0; ahead < STAGES - 1; ++ahead) {
            if (first_tile + ahead * TILE < end) {
                load(first_tile + ahead * TILE, ahead);
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
            first[half] = batch.first_visible(position);
            last[half] = is_there ? position + 1 : 0;
            max[half] = NONE;
            sum[half] = 0.0f;
        }
        const uint32_t all_first = batch.first_visible(position_of(num_rows - 1));
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
        for (uint32_t tile_start = first_tile; tile_start < end; tile_start += TILE) {
            wait_copies<STAGES - 2>();
            // All copies of this tile are there, and nobody reads the tile before any more.
            __syncthreads();
            if (tile_start % CHUNK == 0 && tile_start > first_tile && warp_index() == WARPS - 1) {
                // In place of the chunk before: copies are never a whole chunk behind.
                find_blocks(tile_start / CHUNK + 1);
            }
            const uint32_t next = tile_start + (STAGES - 1) * TILE;
            if (next < end) {
                load(next, slot == 0 ? STAGES - 1 : slot - 1);
            }
            commit_copies();
            const bool is_whole = tile_start >= all_first && tile_start + TILE <= all_last;
            if (!is_whole) {
                clean(slot);
            }
            if (is_at_work) {
                attend(slot, tile_start, is_whole, first, last, chunk_max, chunk_sum, chunk);
                if (!is_whole && *bad_tokens != 0) {
                    UNROLL
                    for (int half = 0; half < 2; ++half) {
                        for (uint32_t token = 0; token < TILE; ++token) {
                            const uint32_t position = tile_start + token;
                            const bool is_seen = position >= first[half] && position < last[half];
                            if (is_seen && (*bad_tokens >> token & 1) != 0) {
                                chunk_sum[2 * half] = __uint_as_float(0x7fffffffu);
                            }
                        }
                    }
                }
                if ((tile_start + TILE) % CHUNK == 0 || tile_start + TILE >= end) {
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
        const uint32_t token = seq.first_token + (first_row + row) / batch.group_len();
        const uint32_t head = kv_head * batch.group_len() + (first_row + row) % batch.group_len();
        return batch.out + (size_t(token) * batch.num_heads + head) * batch.head_dim;
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
                if (dim < batch.head_dim) {
                    out[dim] = numbers[tile][2 * half] / sum[half];
                    out[dim + 1] = numbers[tile][2 * half + 1] / sum[half];
                }
            }
        }
    }

    // A row's partial result of one chunk.
    DEVICE float* state_of(uint32_t partial_start, uint32_t chunk, uint32_t row) const {
        const size_t of_head = size_t(kv_head) * seq.num_chunks() + chunk;
        return batch.partials + (partial_start + of_head * num_rows + row) * (HEAD_DIM + STATE_TAIL);
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
                if (dim + i < batch.head_dim) {
                    out[dim + i] = all[i] / all_sum;
                }
            }
        }
    }
};

template <class Kv, int HEAD_DIM>
DEVICE void attention(const Batch &batch) {
    using Unit = Attention<Kv, HEAD_DIM>;
    DYNAMIC_SHARED(shared);
    SHARED_ARRAY(uint32_t, starts, MAX_SEQS + 1);
    SHARED_ARRAY(uint32_t, partial_starts, MAX_SEQS);
    SHARED_ARRAY(uint32_t, blocks, 2 * PIECES_OF_CHUNK);
    SHARED_ARRAY(uint32_t, of_warps, WARPS);
    // Bad tokens of a tile; the next unit; whether a part was the last.
    SHARED_ARRAY(uint32_t, words, 3);
    list_units<Unit::ROWS>(batch, UnitList{starts, partial_starts}, of_warps);
    if (batch.head_dim < HEAD_DIM) {
        // Dimensions that no copy fills.
        const Bytes16 zeros = {{0, 0, 0, 0}};
        for (int at = threadIdx.x * 16; at < Unit::STAGES * Unit::SLOT_BYTES; at += THREADS * 16) {
            store_16(shared + at, zeros);
        }
        __syncthreads();
    }
    uint32_t* tickets = batch.counters;
    uint32_t* arrivals = batch.counters + 2;
    uint32_t unit = blockIdx.x;
    while (unit < starts[batch.num_seqs]) {
        // Asked for early: the answer takes its time.
        uint32_t next = 0;
        if (threadIdx.x == THREADS - 1) {
            next = gridDim.x + atomicAdd(tickets, 1u);
        }
        // The last sequence that starts at or before the unit; those without units start where the next does.
        uint32_t place = 0;
        uint32_t behind = batch.num_seqs;
        while (behind - place > 1) {
            const uint32_t middle = (place + behind) / 2;
            if (starts[middle] <= unit) {
                place = middle;
            } else {
                behind = middle;
            }
        }
        const uint32_t index = batch.num_seqs - 1 - place;
        const uint32_t partial_start = partial_starts[place];
        const uint32_t part = (unit - starts[place]) / batch.num_kv_heads;
        Unit work = {batch, shared, shared + Unit::STAGES * Unit::SLOT_BYTES, blocks, words};
        work.seq = seq_of(batch, index);
        work.kv_head = (unit - starts[place]) % batch.num_kv_heads;
        work.table = batch.block_tables + size_t(batch.rows[index]) * batch.max_num_blocks;
        const uint32_t all_rows = work.seq.q_len * batch.group_len();
        const bool is_split = partial_start != NO_SPLIT;
        work.first_row = is_split ? 0 : part * Unit::ROWS;
        work.num_rows = min(Unit::ROWS, all_rows - work.first_row);
        work.start = batch.first_visible(work.position_of(0));
        work.end = work.position_of(work.num_rows - 1) + 1;
        if (is_split) {
            const uint32_t chunk = work.seq.first_chunk + part;
            work.start = max(work.start, chunk * CHUNK);
            work.end = min(work.end, (chunk + 1) * CHUNK);
        }
        work.run();
        if (is_split) {
            work.write_part(partial_start, part, arrivals + index * batch.num_kv_heads + work.kv_head, words + 2);
        } else {
            work.write();
        }
        if (threadIdx.x == THREADS - 1) {
            words[1] = next;
        }
        // Nobody reads this unit's tiles any more.
        __syncthreads();
        unit = words[1];
    }
    // The last thread block leaves the tickets as they were found.
    __syncthreads();
    if (threadIdx.x == 0 && add_acquire_release(tickets + 1, 1) + 1 == gridDim.x) {
        tickets[0] = 0;
        tickets[1] = 0;
    }
}

}  // namespace

// Parameters of all kernels:
//   qkv            [num_tokens, (num_heads + 2 num_kv_heads) head_dim] f32, queries first, RoPE applied
//   kv             one layer of the cache
//   out            [num_tokens, num_heads head_dim] f32
//   cu_seqlens_q   [num_seqs + 1]; context_lens, rows: [num_seqs]; block_tables: [num_table_rows, max_num_blocks]
//   partials       [num_partial_rows] partial results of a row and chunk: head_dim of the kernel and 4 numbers each
//   counters       [2 + num_seqs num_kv_heads], zeros before and after
//   window         tokens that a token sees, 0 for all
//   ..._fault      records of what does not fit
// Grid: any number of thread blocks.
#define PARAMETERS                                                                                                     \
    const float* qkv, const uint8_t* kv, float* out, const uint32_t* cu_seqlens_q, const uint32_t* context_lens,       \
        const uint32_t* rows, const uint32_t* block_tables, float* partials, uint32_t* counters, uint32_t num_tokens,  \
        uint32_t num_seqs, uint32_t num_heads, uint32_t num_kv_heads, uint32_t head_dim, uint32_t block_size,          \
        uint32_t num_blocks, uint32_t max_num_blocks, uint32_t num_table_rows, uint32_t window,                        \
        uint32_t num_partial_rows, float scale, uint32_t* context_fault, uint32_t* rows_fault, uint32_t* tables_fault
#define BATCH                                                                                                          \
    Batch {                                                                                                            \
        qkv, kv, out, cu_seqlens_q, context_lens, rows, block_tables, partials, counters, num_tokens, num_seqs,        \
            num_heads, num_kv_heads, head_dim, block_size, num_blocks, max_num_blocks, num_table_rows, window,         \
            num_partial_rows, scale, context_fault, rows_fault, tables_fault                                           \
    }

KERNEL(paged_attention_bf16_64, (128, 2), PARAMETERS) { attention<Bf16, 64>(BATCH); }

KERNEL(paged_attention_bf16_96, (128, 2), PARAMETERS) { attention<Bf16, 96>(BATCH); }

KERNEL(paged_attention_bf16_128, (128, 2), PARAMETERS) { attention<Bf16, 128>(BATCH); }

KERNEL(paged_attention_bf16_256, (128, 2), PARAMETERS) { attention<Bf16, 256>(BATCH); }

KERNEL(paged_attention_int8_64, (128, 2), PARAMETERS) { attention<Int8, 64>(BATCH); }

KERNEL(paged_attention_int8_96, (128, 2), PARAMETERS) { attention<Int8, 96>(BATCH); }

KERNEL(paged_attention_int8_128, (128, 2), PARAMETERS) { attention<Int8, 128>(BATCH); }

KERNEL(paged_attention_int8_256, (128, 2), PARAMETERS) { attention<Int8, 256>(BATCH); }

// A cache of f32: a warp has a row, and each lane a token of a tile for its score, then every 32nd dimension for the sum.
KERNEL(paged_attention_f32, (128), PARAMETERS) {
    constexpr int MAX_DIMS_OF_LANE = 8;
    const Batch batch = BATCH;
    const uint32_t lane = lane_index();
    const uint32_t row = blockIdx.x * WARPS + warp_index();
    if (row >= num_tokens * num_heads) {
        return;
    }
    const uint32_t token = row / num_heads;
    const uint32_t head = row % num_heads;
    // The sequence that holds the token.
    uint32_t index = 0;
    uint32_t behind = num_seqs;
    while (behind - index > 1) {
        const uint32_t middle = (index + behind) / 2;
        if (cu_seqlens_q[middle] <= token) {
            index = middle;
        } else {
            behind = middle;
        }
    }
    const Seq seq = seq_of(batch, index);
    if (token < seq.first_token || token - seq.first_token >= seq.q_len) {
        return;
    }
    const uint32_t* table = block_tables + size_t(rows[index]) * max_num_blocks;
    const uint32_t position = seq.first_position() + token - seq.first_token;
    const uint32_t first = batch.first_visible(position);
    const float* q = qkv + (size_t(token) * (num_heads + 2 * num_kv_heads) + head) * head_dim;
    const float* cache = reinterpret_cast<const float*>(kv);
    const uint32_t kv_head = head / batch.group_len();
    const auto head_of = [&](uint32_t at) {
        uint32_t block = table[at / block_size];
        if (block >= num_blocks) {
            report_fault(tables_fault, block, num_blocks);
            block = 0;
        }
        return cache + (size_t(block) * num_kv_heads + kv_head) * 2 * block_size * head_dim;
    };
    float largest = NONE;
    float sum = 0.0f;
    float numbers[MAX_DIMS_OF_LANE] = {};
    const uint32_t tile_first = first / TILE * TILE;
    for (uint32_t tile_start = tile_first; tile_start <= position; tile_start += TILE) {
        const uint32_t at = tile_start + lane;
        const bool is_seen = at >= first && at <= position;
        float score = NONE;
        if (is_seen) {
            const float* k = head_of(at) + at % block_size;
            float dot = 0.0f;
            for (uint32_t dim = 0; dim < head_dim; ++dim) {
                dot = fmaf(q[dim], k[size_t(dim) * block_size], dot);
            }
            score = dot * scale * 1.44269504f;
        }
        const float new_largest = fmaxf(largest, warp_max(score));
        const float shift = new_largest == NONE ? 0.0f : new_largest;
        const float shrink = exp2f(largest - shift);
        largest = new_largest;
        const float probability = exp2f(score - shift);
        sum = sum * shrink + warp_sum(probability);
        UNROLL
        for (int i = 0; i < MAX_DIMS_OF_LANE; ++i) {
            numbers[i] *= shrink;
        }
        const uint32_t seen_first = max(first, tile_start);
        const uint32_t seen_end = min(position + 1, tile_start + TILE);
        for (uint32_t of = seen_first; of < seen_end; ++of) {
            const float weight = __shfl_sync(ALL_LANES, probability, of - tile_start);
            const float* v = head_of(of) + size_t(block_size) * head_dim + size_t(of % block_size) * head_dim;
            UNROLL
            for (int i = 0; i < MAX_DIMS_OF_LANE; ++i) {
                const uint32_t dim = i * 32 + lane;
                if (dim < head_dim) {
                    numbers[i] = fmaf(weight, v[dim], numbers[i]);
                }
            }
        }
    }
    float* to = out + size_t(row) * head_dim;
    UNROLL
    for (int i = 0; i < MAX_DIMS_OF_LANE; ++i) {
        const uint32_t dim = i * 32 + lane;
        if (dim < head_dim) {
            to[dim] = numbers[i] / sum;
        }
    }
}
