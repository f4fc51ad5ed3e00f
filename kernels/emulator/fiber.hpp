// Stacks of the threads of a block, and switching between them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emulator {

// Bytes of a stack, the lowest page of which cannot be touched.
constexpr size_t STACK_BYTES = 256 * 1024;

#if defined(__x86_64__) || defined(__aarch64__)

#define EMULATOR_STRING_(x) #x
#define EMULATOR_STRING(x) EMULATOR_STRING_(x)
#define EMULATOR_SWITCH EMULATOR_STRING(__USER_LABEL_PREFIX__) "quire_emulator_switch"

// Saves what a call keeps on this stack, its end in `*from`, and goes on where `to` was saved.
extern "C" __attribute__((visibility("hidden"))) void quire_emulator_switch(void** from, void* to);

#if defined(__x86_64__)
__asm__(".text\n.globl " EMULATOR_SWITCH "\n" EMULATOR_SWITCH ":\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
constexpr size_t FRAME_WORDS = 8;
constexpr size_t ENTRY_WORD = 6;
#else
__asm__(".text\n.globl " EMULATOR_SWITCH "\n" EMULATOR_SWITCH ":\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
        "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
        "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
        "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\nret\n");
constexpr size_t FRAME_WORDS = 20;
constexpr size_t ENTRY_WORD = 11;
#endif

// A place to go on from: the end of a stack.
struct Place {
    void* end = nullptr;

    static void leave(Place& from, Place& to) { quire_emulator_switch(&from.end, to.end); }

    // To `entry`, which never returns, on an empty stack that leaves `unused` bytes at its end (a multiple of 16).
    void start(unsigned char* stack, size_t unused, void (*entry)()) {
        auto* frame = reinterpret_cast<uintptr_t*>(stack + STACK_BYTES - unused) - FRAME_WORDS;
        for (size_t word = 0; word < FRAME_WORDS; word++) frame[word] = 0;
        frame[ENTRY_WORD] = reinterpret_cast<uintptr_t>(entry);
        end = frame;
    }
};

#else

struct Place {
    ucontext_t context;

    static void leave(Place& from, Place& to) { swapcontext(&from.context, &to.context); }

    void start(unsigned char* stack, size_t unused, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES - unused;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
};

#endif

// Stacks for `count` threads, one after the other; memory is taken as it is touched.
inline unsigned char* map_stacks(size_t count) {
    void* memory =
        mmap(nullptr, count * STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    auto* stacks = static_cast<unsigned char*>(memory);
    for (size_t index = 0; index < count; index++) {
        mprotect(stacks + index * STACK_BYTES, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    }
    return stacks;
}

}  // namespace emulator
