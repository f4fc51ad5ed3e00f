// Loads and stores of vectors, with hints for the caches, and flags between blocks.
#pragma once

#include "platform.cuh"

// 16 bytes on a multiple of 16.
struct alignas(16) Bytes16 {
    uint32_t word[4];
};

DEVICE Bytes16 load_16(const void* address) {
#ifdef __CUDACC__
    const uint4 v = *static_cast<const uint4*>(address);
    return {{v.x, v.y, v.z, v.w}};
#else
    emulator::require_aligned(address, 16);
    return *static_cast<const Bytes16*>(address);
#endif
}

DEVICE void store_16(void* address, Bytes16 bytes) {
#ifdef __CUDACC__
    *static_cast<uint4*>(address) = make_uint4(bytes.word[0], bytes.word[1], bytes.word[2], bytes.word[3]);
#else
    emulator::require_aligned(address, 16);
    *static_cast<Bytes16*>(address) = bytes;
#endif
}

// Of what nobody writes during the launch and this block reads once: past L1.
DEVICE Bytes16 load_16_streaming(const void* global) {
#ifdef __CUDACC__
    Bytes16 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(global));
    return v;
#else
    return load_16(global);
#endif
}

DEVICE float4 load_float4(const float* address) {
#ifndef __CUDACC__
    emulator::require_aligned(address, 16);
#endif
    return *reinterpret_cast<const float4*>(address);
}

DEVICE void store_float4(float* address, float4 v) {
#ifndef __CUDACC__
    emulator::require_aligned(address, 16);
#endif
    *reinterpret_cast<float4*>(address) = v;
}

// Whether vectors of 16 bytes may be used on an array and on rows of `len` numbers of it.
template <class T> DEVICE bool is_vector_aligned(const T* array, size_t len) {
    return (reinterpret_cast<uintptr_t>(array) | len * sizeof(T)) % 16 == 0;
}

// Asks L2 for a line.
DEVICE void prefetch_l2(const void* global) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
#else
    (void)global;
#endif
}

// Publishes what this thread wrote before: whoever acquires the flag sees it.
DEVICE void store_release(uint32_t* flag, uint32_t value) {
#ifdef __CUDACC__
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
#else
    atomicExch(flag, value);
#endif
}

DEVICE uint32_t load_acquire(const uint32_t* flag) {
#ifdef __CUDACC__
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
#else
    return atomicOr(const_cast<uint32_t*>(flag), 0u);
#endif
}

// Adds and gives what was there, ordered with what this thread wrote before and reads behind.
DEVICE uint32_t add_acquire_release(uint32_t* counter, uint32_t value) {
#ifdef __CUDACC__
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
    return old;
#else
    return atomicAdd(counter, value);
#endif
}

// Spins until the flag has the value. A block waits for blocks with lower indices only: later ones may not have begun.
DEVICE void wait_for_flag(const uint32_t* flag, uint32_t value) {
    while (load_acquire(flag) != value) {
#ifndef __CUDACC__
        emulator::wait_for_others();
#endif
    }
}
