// Rows of a matrix, picked by index.
//
// A thread block has a row and copies it, 16 bytes a thread where rows lie on multiples of that. No shared memory. Reading and
// writing memory is the limit; a decode step copies some hundred rows, and launching is.

#include "fault.cuh"
#include "memory.cuh"

// out[row] = x[indices[row]]; row = blockIdx.x. An index that is not below num_x_rows is a fault.
KERNEL(gather_rows, (256), const float* x, uint32_t num_x_rows, uint32_t dim, const uint32_t* indices, float* out,
       uint32_t* fault_indices) {
    const uint32_t index = indices[blockIdx.x];
    if (index >= num_x_rows) {
        if (threadIdx.x == 0) report_fault(fault_indices, index, num_x_rows);
        return;
    }
    const float* from = x + size_t(index) * dim;
    float* to = out + size_t(blockIdx.x) * dim;
    if (is_vector_aligned(x, dim) && is_vector_aligned(out, dim)) {
        for (uint32_t i = 4 * threadIdx.x; i < dim; i += 4 * blockDim.x) store_float4(to + i, load_float4(from + i));
    } else {
        for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) to[i] = from[i];
    }
}
