// Token ids to rows of the embedding matrix.
//
// A thread block has a token, a thread every 256th number of its row. The matrix is packed for products (weight.cuh), so that
// the numbers of a row lie apart in pieces of some bytes: of each line that is read little is of use, but a step looks up
// few rows. No shared memory.

#include "fault.cuh"
#include "weight.cuh"

// out[token] = table[token_table[token_indices[token]]]; token = blockIdx.x. An index that is not below num_tokens_held and
// a token id that is not below vocab_size are faults.
KERNEL(embed, (256), const uint8_t* table, uint32_t flags, uint32_t vocab_size, uint32_t hidden_size,
       const uint32_t* token_table, uint32_t num_tokens_held, const uint32_t* token_indices, float* out,
       uint32_t* fault_token_indices, uint32_t* fault_token_table) {
    const uint32_t index = token_indices[blockIdx.x];
    if (index >= num_tokens_held) {
        if (threadIdx.x == 0) report_fault(fault_token_indices, index, num_tokens_held);
        return;
    }
    const uint32_t token = token_table[index];
    if (token >= vocab_size) {
        if (threadIdx.x == 0) report_fault(fault_token_table, token, vocab_size);
        return;
    }
    float* to = out + size_t(blockIdx.x) * hidden_size;
    for (uint32_t input = threadIdx.x; input < hidden_size; input += blockDim.x) {
        to[input] = weight_value(table, flags, vocab_size, hidden_size, token, input);
    }
}
