// What CUDA C++ has built in, for the host: what a `.cu` file sees instead of the device's own.
//
// Arithmetic has the bits of the device's where that rounds exactly (+, -, *, /, sqrtf, fmaf); the sources are compiled
// without contraction on both sides. Approximations (`__expf` and the like) are rounded exactly here and are not on a device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "runtime.hpp"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
// Tables that do not change.
#define __constant__ static

#define threadIdx (emulator::self().thread_index)
#define blockIdx (emulator::self().block_index)
#define blockDim (emulator::self().block_dim)
#define gridDim (emulator::self().grid_dim)
#define warpSize 32

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::isfinite;

template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
// Of numbers, the one that is no NaN.
template <> inline float min(float a, float b) { return std::fmin(a, b); }
template <> inline float max(float a, float b) { return std::fmax(a, b); }
template <> inline double min(double a, double b) { return std::fmin(a, b); }
template <> inline double max(double a, double b) { return std::fmax(a, b); }

inline unsigned __float_as_uint(float x) { unsigned bits; memcpy(&bits, &x, 4); return bits; }
inline int __float_as_int(float x) { int bits; memcpy(&bits, &x, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float x; memcpy(&x, &bits, 4); return x; }
inline float __int_as_float(int bits) { float x; memcpy(&x, &bits, 4); return x; }
inline long long __double_as_longlong(double x) { long long bits; memcpy(&bits, &x, 8); return bits; }
inline double __longlong_as_double(long long bits) { double x; memcpy(&x, &bits, 8); return x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __expf(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }
inline float __logf(float x) { return static_cast<float>(std::log(static_cast<double>(x))); }
inline float __log2f(float x) { return static_cast<float>(std::log2(static_cast<double>(x))); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int at = 0; at < 4; at++) {
        const unsigned nibble = selector >> (4 * at) & 0xf;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (nibble & 7))) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * at);
    }
    return result;
}
inline int __dp4a(int a, int b, int c) {
    for (int at = 0; at < 4; at++) {
        c += static_cast<int8_t>(static_cast<unsigned>(a) >> (8 * at)) * static_cast<int8_t>(static_cast<unsigned>(b) >> (8 * at));
    }
    return c;
}
template <class T> inline T __ldg(const T* address) { return *address; }

inline void __syncthreads() { emulator::sync_block(0, 0); }
inline void __syncwarp(unsigned mask = 0xffffffff) { emulator::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace emulator {

// The value that lane `source` brought, of the lanes that carry out one shuffle together.
template <class T> struct Shuffle {
    T value;
    unsigned source;
    T result;

    static void perform(void* const lanes[32], uint32_t) {
        for (unsigned lane = 0; lane < 32; lane++) {
            auto* own = static_cast<Shuffle*>(lanes[lane]);
            if (own == nullptr) continue;
            auto* other = static_cast<Shuffle*>(lanes[own->source & 31]);
            if (other == nullptr) fail("shuffles with lane %u, which is not in the mask", own->source);
            own->result = other->value;
        }
    }
};

template <class T> __attribute__((no_sanitize("thread"))) inline T shuffle(unsigned mask, T value, unsigned source) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
    Shuffle<T> operands = {value, source, value};
    together(mask, &Shuffle<T>::perform, &operands);
    return operands.result;
}

inline unsigned lane() { return self().thread_index.x % 32; }

struct Vote {
    bool is_true;
    unsigned ballot;

    static void perform(void* const lanes[32], uint32_t) {
        unsigned ballot = 0;
        for (unsigned lane = 0; lane < 32; lane++) {
            if (lanes[lane] != nullptr && static_cast<Vote*>(lanes[lane])->is_true) ballot |= 1u << lane;
        }
        for (unsigned lane = 0; lane < 32; lane++) {
            if (lanes[lane] != nullptr) static_cast<Vote*>(lanes[lane])->ballot = ballot;
        }
    }
};

// Looks at the access and does it; nothing comes between, since threads switch only where they wait.
template <class T, class Change> __attribute__((no_sanitize("thread"))) inline T atomically(T* address, Change change) {
    require_aligned(address, sizeof(T));
    touch(address, sizeof(T), Touch::Atomic);
    const T old = *address;
    *address = change(old);
    return old;
}

}  // namespace emulator

template <class T> inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
    const unsigned base = emulator::lane() & ~(unsigned(width) - 1);
    return emulator::shuffle(mask, value, base | (unsigned(lane) & (unsigned(width) - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return emulator::shuffle(mask, value, emulator::lane() ^ unsigned(lanes));
}
// A lane past the end keeps its own value.
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = emulator::lane();
    return emulator::shuffle(mask, value, lane + delta < 32 ? lane + delta : lane);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    const unsigned lane = emulator::lane();
    return emulator::shuffle(mask, value, lane >= delta ? lane - delta : lane);
}
__attribute__((no_sanitize("thread"))) inline unsigned __ballot_sync(unsigned mask, int is_true) {
    emulator::Vote operands = {is_true != 0, 0};
    emulator::together(mask, &emulator::Vote::perform, &operands);
    return operands.ballot;
}
inline int __any_sync(unsigned mask, int is_true) { return __ballot_sync(mask, is_true) != 0; }
inline int __all_sync(unsigned mask, int is_true) { return __ballot_sync(mask, is_true) == mask; }

template <class T> inline T atomicAdd(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return T(old + value); });
}
template <class T> inline T atomicMax(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return old < value ? value : old; });
}
template <class T> inline T atomicMin(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return value < old ? value : old; });
}
template <class T> inline T atomicOr(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return T(old | value); });
}
template <class T> inline T atomicAnd(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return T(old & value); });
}
template <class T> inline T atomicExch(T* address, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T) { return value; });
}
template <class T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return emulator::atomically(address, [=](T old) { return old == expected ? value : old; });
}
