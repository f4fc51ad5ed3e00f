// Barriers of parts of a block, and the order of launches behind each other.
#pragma once

#include "platform.cuh"

// Barrier `id` (1 to 15; 0 is that of __syncthreads) of `threads` threads in whole warps, whichever come.
DEVICE void sync_threads(unsigned id, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulator::sync_block(id, threads);
#endif
}

// Counts as having come, and goes on.
DEVICE void arrive_threads(unsigned id, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emulator::arrive_block(id, threads);
#endif
}

// Where a launch may begin before the one before it ended (Hopper): waits for the end, and for what it wrote. Nothing on
// other devices, where launches do not overlap.
DEVICE void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the launch behind this one begin.
DEVICE void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
