// Causal attention of new tokens over their paged context: decodes and chunks of prompts in one launch.
//
// The queries of a KV head's group are rows of one matrix: row r is head `r % group_len` of new token `r / group_len`. A
// unit of work is up to 64 rows (32 or 16 where heads are wide) of a sequence and KV head: over all of their context, or, where
// they are 16 at most and there is room for partial results, over one chunk of 512 positions. Thread blocks of four warps
// take units by tickets until there are none, so a launch has one grid whatever is in the batch; each of them reckons the
// list of units by itself from the lengths.
//
// A warp owns 16 rows. Where there are no more, all four warps share them: each scores 8 of a tile's 32 tokens, they
// exchange the scores, and each sums a quarter of V's dimensions. With heads of 128 a tile (16 KiB) then takes some 950
// cycles, most of them latency: two thread blocks on a multiprocessor could take 60 bytes a nanosecond, where its share of
// an H200's 4.3 TB/s is 33.
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
// in bf16; the scale of a token multiplies its score, and its probability before V. fp8: as bf16, with such scales. f32: plain multiplications, a warp a
// row.
//
// What may not be looked at does no harm: scores past a row's context are replaced, whatever they are. Where not every row
// sees all of a tile, numbers of V that are not finite are replaced by zeros and their tokens remembered; a row that sees
// one of these is NaN.
//
// Paged attention: Kwon et al. 2023. Online softmax: Milakov and Gimelshein 2018. Rows of a group: FlashInfer (Ye et al. 2025).

#include "rows.cuh"
#include "units.cuh"

namespace {

// What a thread block has in shared memory.
struct Shared {
    // Tiles, then fragments of queries.
    uint8_t* ring;
    uint32_t* starts;
    uint32_t* partial_starts;
    uint32_t* blocks;
    float* exchange;
    // Bad tokens of a tile; the next unit; whether a part was the last.
    uint32_t* words;
};

// A unit of work.
struct Unit {
    // Of the batch.
    uint32_t seq;
    uint32_t kv_head;
    // Chunk of a sequence that is split, else which rows.
    uint32_t part;
    uint32_t partial_start;
};

template <class RowsOf>
DEVICE void work_on(const Batch& batch, const Shared& shared, const Unit& unit, const Seq& seq, uint32_t first_row,
                    uint32_t num_rows) {
    RowsOf rows = {{batch, shared.ring, shared.blocks, shared.words},
                   shared.ring + RowsOf::STAGES * RowsOf::KvTiles::SLOT_BYTES,
                   shared.exchange,
                   seq,
                   first_row,
                   num_rows};
    const bool is_split = unit.partial_start != NO_SPLIT;
    rows.tiles.kv_head = unit.kv_head;
    rows.tiles.table = batch.block_tables + size_t(batch.rows[unit.seq]) * batch.max_num_blocks;
    rows.tiles.start = batch.first_visible(rows.position_of(0));
    rows.tiles.end = rows.position_of(num_rows - 1) + 1;
    if (is_split) {
        const uint32_t chunk = seq.first_chunk + unit.part;
        rows.tiles.start = max(rows.tiles.start, chunk * CHUNK);
        rows.tiles.end = min(rows.tiles.end, (chunk + 1) * CHUNK);
    }
    rows.run();
    if (is_split) {
        uint32_t* arrivals = batch.counters + 2 + unit.seq * batch.num_kv_heads + unit.kv_head;
        rows.write_part(unit.partial_start, unit.part, arrivals, shared.words + 2);
    } else {
        rows.write();
    }
}

template <class Kv, int HEAD_DIM>
DEVICE void attention(const Batch& batch) {
    // Many rows, as far as registers go, and so few that all warps share them. Both have the same order of operations.
    constexpr int MANY_SHARERS = Kv::IS_QUANTIZED && HEAD_DIM > 128 ? WARPS : HEAD_DIM * Kv::PARTS / 128;
    using Many = Rows<Kv, HEAD_DIM, (MANY_SHARERS > 1 ? MANY_SHARERS : 1)>;
    using Few = Rows<Kv, HEAD_DIM, WARPS>;
    DYNAMIC_SHARED(ring);
    SHARED_ARRAY(uint32_t, starts, MAX_SEQS + 1);
    SHARED_ARRAY(uint32_t, partial_starts, MAX_SEQS);
    SHARED_ARRAY(uint32_t, blocks, 2 * PIECES_OF_CHUNK);
    SHARED_ARRAY(float, exchange, 16 * SCORES_STRIDE);
    SHARED_ARRAY(uint32_t, of_warps, WARPS);
    SHARED_ARRAY(uint32_t, words, 3);
    const Shared shared = {ring, starts, partial_starts, blocks, exchange, words};
    list_units<Many::ROWS>(batch, UnitList{starts, partial_starts}, of_warps);
    if (batch.head_dim < HEAD_DIM) {
        // Dimensions that no copy fills.
        const Bytes16 zeros = {{0, 0, 0, 0}};
        for (int at = threadIdx.x * 16; at < Many::STAGES * Many::KvTiles::SLOT_BYTES; at += THREADS * 16) {
            store_16(ring + at, zeros);
        }
        __syncthreads();
    }
    uint32_t* tickets = batch.counters;
    uint32_t ticket = blockIdx.x;
    while (ticket < starts[batch.num_seqs]) {
        // Asked for early: the answer takes its time.
        uint32_t next = 0;
        if (threadIdx.x == THREADS - 1) {
            next = gridDim.x + atomicAdd(tickets, 1u);
        }
        // The last sequence that starts at or before the ticket; those without units start where the next does.
        uint32_t place = 0;
        uint32_t behind = batch.num_seqs;
        while (behind - place > 1) {
            const uint32_t middle = (place + behind) / 2;
            if (starts[middle] <= ticket) {
                place = middle;
            } else {
                behind = middle;
            }
        }
        const uint32_t of_seq = ticket - starts[place];
        const Unit unit = {batch.num_seqs - 1 - place, of_seq % batch.num_kv_heads, of_seq / batch.num_kv_heads,
                           partial_starts[place]};
        const Seq seq = seq_of(batch, unit.seq);
        const uint32_t first_row = unit.partial_start == NO_SPLIT ? unit.part * Many::ROWS : 0;
        const uint32_t num_rows = min(Many::ROWS, seq.q_len * batch.group_len() - first_row);
        if (num_rows <= Few::ROWS) {
            work_on<Few>(batch, shared, unit, seq, first_row, num_rows);
        } else {
            work_on<Many>(batch, shared, unit, seq, first_row, num_rows);
        }
        if (threadIdx.x == THREADS - 1) {
            words[1] = next;
        }
        // Nobody reads this unit's tiles any more.
        __syncthreads();
        ticket = words[1];
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

KERNEL(paged_attention_int8_128, (128, 2), PARAMETERS) { attention<Int8, 128>(BATCH); }

KERNEL(paged_attention_int8_256, (128, 2), PARAMETERS) { attention<Int8, 256>(BATCH); }

KERNEL(paged_attention_fp8_64, (128, 2), PARAMETERS) { attention<Fp8, 64>(BATCH); }

KERNEL(paged_attention_fp8_128, (128, 2), PARAMETERS) { attention<Fp8, 128>(BATCH); }

KERNEL(paged_attention_fp8_256, (128, 2), PARAMETERS) { attention<Fp8, 256>(BATCH); }

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
