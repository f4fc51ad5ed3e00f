// What the emulated sources call. The sources are compiled with the compiler's thread sanitizer instrumentation, so
// that every load and store calls into runtime.cpp first, which is compiled without; there is no sanitizer library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index3 {
    unsigned x, y, z;
};

// The thread that runs, as it sees itself.
struct Thread {
    Index3 thread_index;
    Index3 block_index;
    Index3 block_dim;
    Index3 grid_dim;
};

// Constant within a function: a function is run by one thread.
__attribute__((const)) const Thread& self();

// Ends the launch with an error.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// A shared array: the same for all threads of a block that name the same `key`.
void* static_shared(const void* key, size_t bytes, size_t align);
unsigned char* dynamic_shared();

// An operation that lanes of a warp carry out together. `perform` gets what each lane of `mask` brought; null for others.
using Perform = void (*)(void* const lanes[32], uint32_t mask);
void together(uint32_t mask, Perform perform, void* operands);

void sync_warp(uint32_t mask);
// Barrier `id` of `count` threads; 0 for all threads of the block.
void sync_block(unsigned id, unsigned count);
// The same without waiting.
void arrive_block(unsigned id, unsigned count);

// Lets other threads of the block run; an error where none can.
void wait_for_others();

// Looks at an access that the compiler does not see.
enum class Touch { Read, Write, Atomic };
void touch(const void* address, size_t bytes, Touch access);
// Where bytes must lie on a multiple of their size.
void require_aligned(const void* address, size_t align);
bool is_shared(const void* address);

// 16 bytes, of which `source_bytes` are read and the rest are zero; they arrive when the thread waits for them.
void copy_async(void* shared, const void* global, unsigned source_bytes);
void commit_copies();
// Until at most so many groups that were committed are on their way.
void wait_copies(unsigned pending_groups);

// One byte for each parameter: p pointer, u and i 32 bits, U and I 64 bits, f 32 bits.
struct Kernel {
    const char* name;
    const char* parameters;
    unsigned max_threads;
    void (*call)(void** args);
    Kernel* next;
    Kernel(const char* name, const char* parameters, unsigned max_threads, void (*call)(void** args));
};

template <class T> constexpr char parameter_code() {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a parameter has 4 or 8 bytes");
    if (sizeof(T) == 8) return T(-1) < T(0) ? 'I' : 'U';
    return T(1) / T(2) != T(0) ? 'f' : T(-1) < T(0) ? 'i' : 'u';
}

template <class T> struct ParameterCode {
    static constexpr char value = parameter_code<T>();
};
template <class T> struct ParameterCode<T*> {
    static constexpr char value = 'p';
};

template <auto function> struct Entry;
template <class... Parameters, void (*function)(Parameters...)> struct Entry<function> {
    static constexpr char parameters[] = {ParameterCode<Parameters>::value..., 0};

    template <size_t... indices> struct List {};
    template <size_t count, size_t... indices> struct Count : Count<count - 1, count - 1, indices...> {};
    template <size_t... indices> struct Count<0, indices...> {
        using Result = List<indices...>;
    };

    template <size_t... indices>
    __attribute__((no_sanitize("thread"))) static void spread(void** args, List<indices...>) {
        function(*static_cast<Parameters*>(args[indices])...);
    }

    __attribute__((no_sanitize("thread"))) static void call(void** args) { spread(args, typename Count<sizeof...(Parameters)>::Result{}); }
};

}  // namespace emulator
