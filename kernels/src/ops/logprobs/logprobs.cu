// Log probabilities of given and of most likely tokens.
//
// A thread block has an entry: one row of logits. Thread t owns the tokens whose id is t modulo the block. Two passes over the
// row give the largest logit, then the sum of exponentials (f64, thread by thread in ascending order, then lanes and warps
// as in warp.cuh: an order that the vocabulary fixes) together with the rank. For the most likely tokens every thread keeps
// the best of its own; the block's best is taken again and again, and the thread that it was of looks for its next. Sums
// of warps are all there is in shared memory.

#include "exp2.cuh"
#include "fault.cuh"
#include "ordered.cuh"
#include "warp.cuh"

using Key = unsigned long long;

// Larger is more likely; among equals, the lower id. None is 0: ids are below UINT32_MAX.
DEVICE Key key_of(float x, uint32_t id) { return static_cast<Key>(ordered(x)) << 32 | (0xffffffffu - id); }

// The largest key of the thread's tokens below `limit`.
DEVICE Key best_below(const float* logits, uint32_t vocab_size, Key limit) {
    Key best = 0;
    for (uint32_t id = threadIdx.x; id < vocab_size; id += blockDim.x) {
        const Key key = key_of(logits[id], id);
        if (key < limit && key > best) best = key;
    }
    return best;
}

// Entry i = blockIdx.x is rows[2 * i], a row of logits, and rows[2 * i + 1], an index into tokens. Writes
// out_values[i * (1 + num_top)..] and out_ids[i * (1 + num_top)..]: value and rank of the token, then the num_top most likely
// tokens in order, lower id first among equals, NaN last. A token of UINT32_MAX has value NaN and rank 0.
KERNEL(logprobs, (1024), const float* logits, uint32_t num_logits_rows, uint32_t vocab_size, const uint32_t* rows,
       const uint32_t* tokens, uint32_t num_tokens, uint32_t num_top, float* out_values, uint32_t* out_ids,
       uint32_t* fault_logits_row, uint32_t* fault_token_index, uint32_t* fault_tokens) {
    SHARED_ARRAY(float, of_warps, 32);
    SHARED_ARRAY(double, sums, 32);
    SHARED_ARRAY(uint32_t, counts, 32);
    SHARED_ARRAY(Key, keys, 32);
    constexpr uint32_t NO_TOKEN = 0xffffffffu;
    const uint32_t row = rows[2 * blockIdx.x], token_index = rows[2 * blockIdx.x + 1];
    if (row >= num_logits_rows) {
        if (threadIdx.x == 0) report_fault(fault_logits_row, row, num_logits_rows);
        return;
    }
    if (token_index >= num_tokens) {
        if (threadIdx.x == 0) report_fault(fault_token_index, token_index, num_tokens);
        return;
    }
    const uint32_t token = tokens[token_index];
    if (token != NO_TOKEN && token >= vocab_size) {
        if (threadIdx.x == 0) report_fault(fault_tokens, token, vocab_size);
        return;
    }
    logits += size_t(row) * vocab_size;
    out_values += size_t(blockIdx.x) * (1 + num_top);
    out_ids += size_t(blockIdx.x) * (1 + num_top);

    float largest = -INFINITY;
    for (uint32_t id = threadIdx.x; id < vocab_size; id += blockDim.x) largest = max(largest, logits[id]);
    largest = block_max(largest, of_warps);

    const float chosen = token == NO_TOKEN ? __uint_as_float(0x7fc00000u) : logits[token];
    double sum = 0.0;
    uint32_t before = 0;
    for (uint32_t id = threadIdx.x; id < vocab_size; id += blockDim.x) {
        const float x = logits[id];
        sum += static_cast<double>(exp2_exact((x - largest) * 1.44269504f));
        before += x > chosen || (x == chosen && id < token) ? 1 : 0;
    }
    const double log_total = log(block_sum(sum, sums));
    before = block_sum(before, counts);
    const auto log_softmax = [=](float x) {
        return static_cast<float>(static_cast<double>(x) - static_cast<double>(largest) - log_total);
    };
    if (threadIdx.x == 0) {
        out_values[0] = token == NO_TOKEN ? chosen : log_softmax(chosen);
        out_ids[0] = token == NO_TOKEN ? 0 : 1 + before;
    }

    if (num_top == 0) return;
    Key own = best_below(logits, vocab_size, ~Key(0));
    for (uint32_t place = 1; place <= num_top; place++) {
        const Key best = block_max(own, keys);
        if (own == best) own = best_below(logits, vocab_size, best);
        if (threadIdx.x == 0) {
            out_values[place] = log_softmax(of_ordered(static_cast<uint32_t>(best >> 32)));
            out_ids[place] = 0xffffffffu - static_cast<uint32_t>(best);
        }
    }
}
