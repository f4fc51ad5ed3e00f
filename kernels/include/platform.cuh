// What a .cu file needs of its compiler: nvcc for a device, or the system's C++ compiler for the emulator of kernels/emulator.
//
// A kernel reads `KERNEL(name, (threads), parameters...) { body }`, where `(threads, blocks)` are launch bounds: most threads
// of a block, and blocks that a multiprocessor shall have room for. Parameters are pointers and numbers of 4 or 8 bytes.
// Both builds are without contraction of products and sums: write `fmaf` where one rounding is wanted.
#pragma once

#include <stdint.h>

#define DEVICE __device__ __forceinline__

#ifdef __CUDACC__

#define KERNEL(name, bounds, ...) extern "C" __global__ void __launch_bounds__ bounds name(__VA_ARGS__)
// An array of the block; `name` is the array.
#define SHARED_ARRAY(type, name, len) __shared__ type name[len]
// The block's dynamic shared memory, as bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define UNROLL _Pragma("unroll")
// So many times.
#define PRAGMA_OF(text) _Pragma(#text)
#define UNROLL_BY(times) PRAGMA_OF(unroll times)

#else

#include "emulator.hpp"

namespace emulator {
constexpr unsigned most_threads(unsigned threads, unsigned = 1) { return threads; }
}  // namespace emulator

#define KERNEL(name, bounds, ...)                                                                                  \
    extern "C" void name(__VA_ARGS__);                                                                             \
    static emulator::Kernel emulated_##name(#name, emulator::Entry<&name>::parameters, emulator::most_threads bounds, \
                                            &emulator::Entry<&name>::call);                                        \
    extern "C" void name(__VA_ARGS__)
#define SHARED_ARRAY(type, name, len)      \
    static const char emulated_##name = 0; \
    type(&name)[len] =                     \
        *static_cast<type(*)[len]>(emulator::static_shared(&emulated_##name, sizeof(type) * (len), alignof(type)))
#define DYNAMIC_SHARED(name) unsigned char* const name = emulator::dynamic_shared()
#define UNROLL
#define UNROLL_BY(times)

#endif
