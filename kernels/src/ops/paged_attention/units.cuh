// A batch and its units of work: which rows of which sequence over which part of their context.
#pragma once

#include "fault.cuh"
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

}  // namespace
