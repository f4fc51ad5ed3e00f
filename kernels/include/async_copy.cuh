// Copies of 16 bytes from global to shared memory that the thread does not wait for (cp.async).
//
// A thread sees what it copied itself after its wait; other threads after a barrier behind that wait.
#pragma once

#include "platform.cuh"

// Both on multiples of 16 bytes. Past L1: for what the block reads once.
DEVICE void copy_async_16(void* shared, const void* global) {
#ifdef __CUDACC__
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
    emulator::copy_async(shared, global, 16);
#endif
}

// The first `bytes` (0 to 16) of the 16, zeros behind them. With 0, `global` is not read, but must be an address of a buffer.
DEVICE void copy_async_16_or_zeros(void* shared, const void* global, unsigned bytes) {
#ifdef __CUDACC__
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
#else
    emulator::copy_async(shared, global, bytes);
#endif
}

// Ends a group: the copies of this thread since the last group.
DEVICE void commit_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulator::commit_copies();
#endif
}

// Until at most so many of this thread's groups are on their way, the last ones.
template <int pending_groups> DEVICE void wait_copies() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(pending_groups) : "memory");
#else
    emulator::wait_copies(pending_groups);
#endif
}
