// Warps: who is who, and sums, maxima and running sums over lanes and warps in an order that depends on nothing.
#pragma once

#include "platform.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;

// Blocks have one dimension.
DEVICE unsigned lane_index() { return threadIdx.x % 32; }
DEVICE unsigned warp_index() { return threadIdx.x / 32; }

// Sum of all lanes, in every lane: halves onto each other, 16, 8, 4, 2, 1.
template <class T> DEVICE T warp_sum(T x) {
    UNROLL
    for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(ALL_LANES, x, half);
    return x;
}

// The largest of all lanes, in every lane; NaN is passed over.
template <class T> DEVICE T warp_max(T x) {
    UNROLL
    for (int half = 16; half > 0; half /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, half));
    return x;
}

template <class T> DEVICE T warp_min(T x) {
    UNROLL
    for (int half = 16; half > 0; half /= 2) x = min(x, __shfl_xor_sync(ALL_LANES, x, half));
    return x;
}

// Sum of this and all lower lanes.
template <class T> DEVICE T warp_running_sum(T x) {
    UNROLL
    for (unsigned step = 1; step < 32; step *= 2) {
        const T below = __shfl_up_sync(ALL_LANES, x, step);
        if (lane_index() >= step) x += below;
    }
    return x;
}

// Of what each warp left in `of_warps`, number `warp` of the block's; `none` where there is no such warp.
template <class T> DEVICE T of_lane_warp(const T* of_warps, T none) {
    return lane_index() < blockDim.x / 32 ? of_warps[lane_index()] : none;
}

// Sum over a block of whole warps, in every thread: lanes as above, then warps the same way. `of_warps` has room for one
// number per warp and may be used again after the call.
template <class T> DEVICE T block_sum(T x, T* of_warps) {
    x = warp_sum(x);
    if (lane_index() == 0) of_warps[warp_index()] = x;
    __syncthreads();
    const T sum = warp_sum(of_lane_warp(of_warps, T(0)));
    __syncthreads();
    return sum;
}

// As `block_sum`, of the largest.
template <class T> DEVICE T block_max(T x, T* of_warps) {
    x = warp_max(x);
    if (lane_index() == 0) of_warps[warp_index()] = x;
    __syncthreads();
    const T largest = warp_max(of_lane_warp(of_warps, of_warps[0]));
    __syncthreads();
    return largest;
}

template <class T> DEVICE T block_min(T x, T* of_warps) {
    x = warp_min(x);
    if (lane_index() == 0) of_warps[warp_index()] = x;
    __syncthreads();
    const T smallest = warp_min(of_lane_warp(of_warps, of_warps[0]));
    __syncthreads();
    return smallest;
}
