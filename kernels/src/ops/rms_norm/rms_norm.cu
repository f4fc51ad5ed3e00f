// Root mean square normalisation (Zhang and Sennrich 2019).
//
// A thread block has a row. Thread t sums the squares of the numbers whose index is t modulo the block, in ascending
// order; lanes and then warps are added as in warp.cuh, so the order depends on the width of a row only. Numbers are read twice,
// the second time from the nearest cache. 32 numbers of shared memory for the sums of the warps.

#include "warp.cuh"

// out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight; row = blockIdx.x
KERNEL(rms_norm, (256), const float* x, const float* weight, float eps, uint32_t dim, float* out) {
    SHARED_ARRAY(float, of_warps, 32);
    const float* from = x + size_t(blockIdx.x) * dim;
    float* to = out + size_t(blockIdx.x) * dim;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) sum = fmaf(from[i], from[i], sum);
    const float mean = block_sum(sum, of_warps) / static_cast<float>(dim);
    const float factor = 1.0f / sqrtf(mean + eps);
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) to[i] = from[i] * factor * weight[i];
}
