// Runs a grid on the host: blocks one after another, the threads of a block as fibers that switch where they wait.
//
// A block's threads run in ascending order, each up to where it waits for others; the last lane to come to an operation of
// its warp carries it out for all. When nobody can run and not all have ended, what they wait for never comes:
// an error that says who waits where. Every load and store of the kernel comes by (see `touch`) and is looked up in the
// block's shared memory, in the buffers of the launch, or on the thread's own stack; anything else is an error too.

#include "runtime.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <link.h>
#include <memory>
#include <unordered_map>

#include "fiber.hpp"
#include "shadow.hpp"

namespace emulator {
namespace {

// Most shared memory of a block, static and dynamic each, and what lies around both.
constexpr size_t MAX_SHARED = 232 * 1024;
constexpr size_t GUARD = 1024;
constexpr size_t SHARED_BYTES = 2 * MAX_SHARED + 3 * GUARD;
constexpr size_t DYNAMIC_START = 2 * GUARD + MAX_SHARED;
constexpr unsigned MAX_STATIC_ARRAYS = 64;
constexpr unsigned MAX_BARRIERS = 16;
constexpr unsigned MAX_COPIES = 1024;
// Of buffers; more pages than these are not looked after.
constexpr size_t PAGE = 4096;
constexpr size_t MAX_PAGES = 4096;

// Memory that a launch may touch.
struct Buffer {
    uintptr_t start;
    uintptr_t end;
    const char* name;
};

struct Request {
    const char* kernel;
    Index3 grid;
    Index3 block;
    uint32_t shared_bytes;
    void** args;
    size_t num_args;
    // In ascending order.
    const Buffer* buffers;
    size_t num_buffers;
    char* error;
    size_t error_len;
};

enum class State : uint8_t { Ready, Together, Barrier, Waits, Ended };

struct PendingCopy {
    unsigned char* to;
    unsigned char bytes[16];
    // Group that it was committed in; UINT32_MAX before.
    uint32_t group;
};

struct Fiber {
    Place place;
    Thread thread;
    State state;
    bool has_waited;
    unsigned barrier;
    uint32_t mask;
    Perform perform;
    void* operands;
    PendingCopy* copies;
    unsigned num_copies;
    uint32_t num_groups;
};

// Lanes that wait for others, and those that have ended.
struct Warp {
    uint32_t together;
    uint32_t ended;
};

struct Barrier {
    unsigned expected;
    unsigned arrived;
    uint32_t warps;
};

struct StaticArray {
    const void* key;
    size_t start;
};

struct Machine {
    const Request* request = nullptr;
    const Kernel* kernel = nullptr;
    Fiber* running = nullptr;
    unsigned num_threads = 0;
    unsigned num_ended = 0;
    unsigned num_static = 0;
    size_t static_bytes = 0;
    const Buffer* last_buffer = nullptr;
    bool has_failed = false;
    bool has_progress = false;
    Place main;
    unsigned char* stacks = map_stacks(MAX_THREADS);
    unsigned char* shared;
    Clocks clocks;
    Shadow shadow{clocks, SHARED_BYTES};
    // Of the pages of buffers that this launch wrote to, by their numbers.
    std::unordered_map<uintptr_t, std::unique_ptr<Shadow>> pages;
    uintptr_t last_page = 0;
    Shadow* last_page_shadow = nullptr;
    Fiber fibers[MAX_THREADS] = {};
    Warp warps[MAX_WARPS];
    Barrier barriers[MAX_BARRIERS];
    StaticArray statics[MAX_STATIC_ARRAYS];
    // Of this library: its constants are read as any memory.
    uintptr_t image_start = 0;
    uintptr_t image_end = 0;

    Machine() {
        void* memory = nullptr;
        if (posix_memalign(&memory, 1024, SHARED_BYTES) != 0) abort();
        shared = static_cast<unsigned char*>(memory);
        dl_iterate_phdr(find_image, this);
    }

    ~Machine() {
        munmap(stacks, MAX_THREADS * STACK_BYTES);
        free(shared);
        for (Fiber& fiber : fibers) delete[] fiber.copies;
    }

    static int find_image(dl_phdr_info* info, size_t, void* self) {
        auto* machine = static_cast<Machine*>(self);
        uintptr_t start = UINTPTR_MAX, end = 0;
        for (int index = 0; index < info->dlpi_phnum; index++) {
            const auto& header = info->dlpi_phdr[index];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t from = info->dlpi_addr + header.p_vaddr;
            if (from < start) start = from;
            if (from + header.p_memsz > end) end = from + header.p_memsz;
        }
        const auto here = reinterpret_cast<uintptr_t>(&find_image);
        if (here < start || here >= end) return 0;
        machine->image_start = start;
        machine->image_end = end;
        return 1;
    }
};

// Of this thread, while it runs a launch.
#ifdef __GLIBC__
__attribute__((tls_model("initial-exec")))
#endif
thread_local Machine* machine = nullptr;
Kernel* first_kernel = nullptr;

unsigned thread_of(const Fiber& fiber) { return static_cast<unsigned>(&fiber - machine->fibers); }

void to_main() { Place::leave(machine->running->place, machine->main); }

// Threads `first..` that `is_one` is true for, as ranges.
template <class IsOne> void list_threads(char* text, size_t len, IsOne is_one) {
    size_t used = 0;
    text[0] = 0;
    for (unsigned start = 0; start < machine->num_threads && used + 32 < len;) {
        if (!is_one(machine->fibers[start])) {
            start++;
            continue;
        }
        unsigned end = start;
        while (end + 1 < machine->num_threads && is_one(machine->fibers[end + 1])) end++;
        used += static_cast<size_t>(snprintf(text + used, len - used, start == end ? "%s%u" : "%s%u to %u",
                                             used > 0 ? ", " : "", start, end));
        start = end + 1;
    }
}

void write_error(const char* format, va_list args) {
    const Request& request = *machine->request;
    int used = snprintf(request.error, request.error_len, "%s: ", request.kernel);
    if (machine->running != nullptr) {
        const Index3& block = machine->running->thread.block_index;
        used += snprintf(request.error + used, request.error_len - static_cast<size_t>(used),
                         "block (%u, %u, %u), thread %u ", block.x, block.y, block.z, thread_of(*machine->running));
    }
    vsnprintf(request.error + used, request.error_len - static_cast<size_t>(used), format, args);
    machine->has_failed = true;
}

__attribute__((format(printf, 1, 2))) void report(const char* format, ...) {
    va_list args;
    va_start(args, format);
    machine->running = nullptr;
    write_error(format, args);
    va_end(args);
}

// What the threads wait for that never comes.
void report_deadlock() {
    char waiting[256], ended[256], lanes[256];
    list_threads(waiting, sizeof waiting, [](const Fiber& f) { return f.state == State::Barrier; });
    list_threads(lanes, sizeof lanes, [](const Fiber& f) { return f.state == State::Together; });
    list_threads(ended, sizeof ended, [](const Fiber& f) { return f.state == State::Ended; });
    const Index3& block = machine->fibers[0].thread.block_index;
    const char* none = "none";
    report("block (%u, %u, %u) cannot go on: at a barrier threads %s; at an operation of their warp threads %s; ended "
           "threads %s; the others wait for memory",
           block.x, block.y, block.z, waiting[0] ? waiting : none, lanes[0] ? lanes : none, ended[0] ? ended : none);
}

void complete(Fiber& fiber, PendingCopy& copy) {
    const size_t start = static_cast<size_t>(copy.to - machine->shared);
    const Conflict conflict = machine->shadow.touch(start, 16, thread_of(fiber), Access::CopyDone);
    if (conflict.what != nullptr) {
        fail("waits for a copy to shared byte %zu that %s (thread %u)", start, conflict.what, conflict.other);
    }
    memcpy(copy.to, copy.bytes, 16);
}

void fiber_main() {
    for (;;) {
        machine->kernel->call(machine->request->args);
        Fiber& fiber = *machine->running;
        for (unsigned index = 0; index < fiber.num_copies; index++) complete(fiber, fiber.copies[index]);
        fiber.num_copies = 0;
        fiber.state = State::Ended;
        const unsigned thread = thread_of(fiber);
        machine->warps[thread / 32].ended |= uint32_t(1) << thread % 32;
        machine->num_ended++;
        to_main();
    }
}

// Writes what is around `address` and gives up.
[[noreturn]] void fail_outside(uintptr_t address, size_t bytes, const char* verb) {
    const Request& request = *machine->request;
    const uintptr_t shared = reinterpret_cast<uintptr_t>(machine->shared);
    if (address - shared < SHARED_BYTES) {
        const size_t offset = address - shared;
        if (offset >= DYNAMIC_START - GUARD) {
            fail("%s %zu bytes of shared memory at %zd, outside of its %u bytes", verb, bytes,
                 static_cast<ptrdiff_t>(offset) - static_cast<ptrdiff_t>(DYNAMIC_START), request.shared_bytes);
        }
        fail("%s %zu bytes outside of the block's shared arrays", verb, bytes);
    }
    const Buffer* nearest = nullptr;
    uintptr_t distance = 1 << 20;
    bool is_before = false;
    for (size_t index = 0; index < request.num_buffers; index++) {
        const Buffer& buffer = request.buffers[index];
        const bool before = address < buffer.start;
        const uintptr_t off = before ? buffer.start - address : address + bytes - buffer.end;
        if (off < distance) {
            nearest = &buffer;
            distance = off;
            is_before = before;
        }
    }
    if (nearest == nullptr) {
        fail("%s %zu bytes at %#zx, where no buffer is", verb, bytes, static_cast<size_t>(address));
    }
    char argument[32] = "";
    for (size_t index = 0; index < request.num_args; index++) {
        uintptr_t value = 0;
        if (machine->kernel->parameters[index] != 'p') continue;
        memcpy(&value, request.args[index], sizeof value);
        if (value >= nearest->start && value < nearest->end) {
            snprintf(argument, sizeof argument, ", argument %zu", index);
            break;
        }
    }
    fail("%s %zu bytes that reach %zu bytes %s %s (%zu bytes%s)", verb, bytes, static_cast<size_t>(distance),
         is_before ? "before" : "past the end of", nearest->name, static_cast<size_t>(nearest->end - nearest->start),
         argument);
}

void touch_shared(size_t offset, size_t bytes, Access access) {
    const bool is_static = offset >= GUARD && offset + bytes <= GUARD + machine->static_bytes;
    const bool is_dynamic = offset >= DYNAMIC_START && offset + bytes <= DYNAMIC_START + machine->request->shared_bytes;
    const char* verb = access == Access::Read ? "reads" : "writes";
    if (!is_static && !is_dynamic) {
        fail_outside(reinterpret_cast<uintptr_t>(machine->shared) + offset, bytes, verb);
    }
    const Conflict conflict = machine->shadow.touch(offset, bytes, thread_of(*machine->running), access);
    if (conflict.what != nullptr) {
        fail("%s (thread %u; %zu bytes of %s shared memory at %zu)", conflict.what, conflict.other, bytes,
             is_static ? "static" : "dynamic", offset - (is_static ? GUARD : DYNAMIC_START));
    }
}

void forget_pages() {
    machine->pages.clear();
    machine->last_page_shadow = nullptr;
}

// Threads of one block that use the same bytes of a buffer; blocks are not compared with each other. What a launch only
// reads is not remembered.
void touch_buffer(const Buffer& buffer, uintptr_t address, size_t bytes, Access access) {
    for (const uintptr_t end = address + bytes; address < end;) {
        const uintptr_t page = address / PAGE;
        const size_t len = (page + 1) * PAGE < end ? (page + 1) * PAGE - address : end - address;
        if (machine->last_page_shadow == nullptr || machine->last_page != page) {
            auto found = machine->pages.find(page);
            if (found == machine->pages.end()) {
                if (access == Access::Read || machine->pages.size() == MAX_PAGES) {
                    address += len;
                    continue;
                }
                found = machine->pages.emplace(page, std::make_unique<Shadow>(machine->clocks, PAGE)).first;
            }
            machine->last_page = page;
            machine->last_page_shadow = found->second.get();
        }
        const Conflict conflict =
            machine->last_page_shadow->touch(address % PAGE, len, thread_of(*machine->running), access);
        if (conflict.what != nullptr) {
            fail("%s (thread %u; %zu bytes of %s at %zu)", conflict.what, conflict.other, bytes, buffer.name,
                 static_cast<size_t>(address - buffer.start));
        }
        address += len;
    }
}

void touch_any(uintptr_t address, size_t bytes, Access access) {
    if (machine == nullptr || machine->running == nullptr) return;
    if (address - reinterpret_cast<uintptr_t>(machine->stacks) < MAX_THREADS * STACK_BYTES) return;
    const size_t offset = address - reinterpret_cast<uintptr_t>(machine->shared);
    if (offset < SHARED_BYTES) return touch_shared(offset, bytes, access);
    const Buffer* last = machine->last_buffer;
    if (last != nullptr && address >= last->start && address + bytes <= last->end) {
        return touch_buffer(*last, address, bytes, access);
    }
    const Request& request = *machine->request;
    size_t from = 0, to = request.num_buffers;
    while (from < to) {
        const size_t middle = (from + to) / 2;
        if (request.buffers[middle].end <= address) from = middle + 1;
        else to = middle;
    }
    if (from < request.num_buffers && address >= request.buffers[from].start &&
        address + bytes <= request.buffers[from].end) {
        machine->last_buffer = &request.buffers[from];
        return touch_buffer(request.buffers[from], address, bytes, access);
    }
    if (access == Access::Read) {
        // Constants of the library, and who the thread is.
        if (address >= machine->image_start && address + bytes <= machine->image_end) return;
        if (address - reinterpret_cast<uintptr_t>(machine->fibers) < sizeof machine->fibers) return;
    }
    fail_outside(address, bytes, access == Access::Read ? "reads" : "writes");
}

// Runs the lanes of a warp until none of them can.
void run_warp(unsigned warp) {
    for (bool ran = true; ran && !machine->has_failed;) {
        ran = false;
        for (unsigned index = warp * 32; index < warp * 32 + 32 && !machine->has_failed; index++) {
            Fiber& fiber = machine->fibers[index];
            if (fiber.state != State::Ready) continue;
            ran = true;
            machine->running = &fiber;
            Place::leave(machine->main, fiber.place);
            // To look once more and still wait is no progress.
            machine->has_progress |= !fiber.has_waited || fiber.state != State::Waits;
            fiber.has_waited = false;
        }
    }
}

void run_block(Index3 block_index) {
    const Request& request = *machine->request;
    machine->num_ended = machine->num_static = 0;
    machine->static_bytes = 0;
    if (machine->clocks.start_block()) {
        machine->shadow.clear();
        forget_pages();
    }
    // What nobody wrote is not a number.
    memset(machine->shared + DYNAMIC_START, 0xff, request.shared_bytes);
    for (Barrier& barrier : machine->barriers) barrier = Barrier{};
    for (Warp& warp : machine->warps) warp = Warp{};
    for (unsigned index = 0; index < machine->num_threads; index++) {
        Fiber& fiber = machine->fibers[index];
        const Index3& dim = request.block;
        fiber.thread = {{index % dim.x, index / dim.x % dim.y, index / dim.x / dim.y}, block_index, dim, request.grid};
        fiber.state = State::Ready;
        fiber.has_waited = false;
        fiber.num_copies = 0;
        fiber.num_groups = 0;
        // Stacks begin at different lines of a page, or they would push each other out of the host's caches.
        fiber.place.start(machine->stacks + index * STACK_BYTES, index * 13 % 64 * 256, fiber_main);
    }
    while (machine->num_ended < machine->num_threads) {
        machine->has_progress = false;
        for (unsigned warp = 0; warp * 32 < machine->num_threads; warp++) {
            run_warp(warp);
            if (machine->has_failed) return;
        }
        if (!machine->has_progress) return report_deadlock();
        // Who waits for memory looks again as long as anything happens.
        for (unsigned index = 0; index < machine->num_threads; index++) {
            Fiber& fiber = machine->fibers[index];
            if (fiber.state != State::Waits) continue;
            fiber.state = State::Ready;
            fiber.has_waited = true;
        }
    }
    machine->running = nullptr;
}

void arrive(unsigned id, unsigned count) {
    if (id >= MAX_BARRIERS) fail("names barrier %u; there are %u", id, MAX_BARRIERS);
    const unsigned expected = count == 0 ? machine->num_threads : count;
    if (expected % 32 != 0 || expected > machine->num_threads) fail("names a barrier of %u threads", expected);
    Barrier& barrier = machine->barriers[id];
    if (barrier.arrived > 0 && barrier.expected != expected) {
        fail("comes to barrier %u of %u threads, where others wait for %u", id, expected, barrier.expected);
    }
    barrier.expected = expected;
    barrier.arrived++;
    barrier.warps |= uint32_t(1) << thread_of(*machine->running) / 32;
}

// Lets everyone go where all have come.
bool open_barrier(unsigned id) {
    Barrier& barrier = machine->barriers[id];
    if (barrier.arrived < barrier.expected) return false;
    machine->clocks.sync_warps(barrier.warps);
    barrier = Barrier{};
    for (unsigned index = 0; index < machine->num_threads; index++) {
        Fiber& fiber = machine->fibers[index];
        if (fiber.state == State::Barrier && fiber.barrier == id) fiber.state = State::Ready;
    }
    return true;
}

}  // namespace

Kernel::Kernel(const char* name, const char* parameters, unsigned max_threads, void (*call)(void** args))
    : name(name), parameters(parameters), max_threads(max_threads), call(call), next(first_kernel) {
    first_kernel = this;
}

const Thread& self() { return machine->running->thread; }

void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    write_error(format, args);
    va_end(args);
    to_main();
    abort();
}

void* static_shared(const void* key, size_t bytes, size_t align) {
    for (unsigned index = 0; index < machine->num_static; index++) {
        if (machine->statics[index].key == key) return machine->shared + machine->statics[index].start;
    }
    const size_t start = (GUARD + machine->static_bytes + align - 1) / align * align;
    if (machine->num_static == MAX_STATIC_ARRAYS || start + bytes > GUARD + 48 * 1024) {
        fail("has more than 48 KiB of static shared memory");
    }
    memset(machine->shared + start, 0xff, bytes);
    machine->statics[machine->num_static++] = {key, start};
    machine->static_bytes = start + bytes - GUARD;
    return machine->shared + start;
}

unsigned char* dynamic_shared() { return machine->shared + DYNAMIC_START; }

bool is_shared(const void* address) {
    return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(machine->shared) < SHARED_BYTES;
}

void together(uint32_t mask, Perform perform, void* operands) {
    Fiber& fiber = *machine->running;
    const unsigned thread = thread_of(fiber), first = thread / 32 * 32;
    if (!(mask >> thread % 32 & 1)) fail("is not in the mask %#x of an operation of its warp", mask);
    Warp& warp = machine->warps[thread / 32];
    if (warp.ended & mask) fail("waits for lane %d, which has ended", __builtin_ctz(warp.ended & mask));
    fiber.state = State::Together;
    fiber.mask = mask;
    fiber.perform = perform;
    fiber.operands = operands;
    warp.together |= uint32_t(1) << thread % 32;
    void* lanes[32] = {};
    bool is_last = (warp.together & mask) == mask;
    for (unsigned lane = 0; lane < 32 && is_last; lane++) {
        if (!(mask >> lane & 1)) continue;
        const Fiber& other = machine->fibers[first + lane];
        is_last = other.perform == perform && other.mask == mask;
        lanes[lane] = other.operands;
    }
    // The last of them carries it out.
    if (!is_last) return to_main();
    perform(lanes, mask);
    warp.together &= ~mask;
    for (unsigned lane = 0; lane < 32; lane++) {
        if (mask >> lane & 1) machine->fibers[first + lane].state = State::Ready;
    }
}

void sync_warp(uint32_t mask) {
    together(mask, [](void* const*, uint32_t) { machine->clocks.sync_warp(thread_of(*machine->running) / 32); }, nullptr);
}

void sync_block(unsigned id, unsigned count) {
    arrive(id, count);
    Fiber& fiber = *machine->running;
    fiber.state = State::Barrier;
    fiber.barrier = id;
    if (!open_barrier(id)) to_main();
}

void arrive_block(unsigned id, unsigned count) {
    arrive(id, count);
    open_barrier(id);
}

void wait_for_others() {
    machine->running->state = State::Waits;
    to_main();
}

void touch(const void* address, size_t bytes, Touch access) {
    const Access kind = access == Touch::Read ? Access::Read : access == Touch::Write ? Access::Write : Access::Atomic;
    touch_any(reinterpret_cast<uintptr_t>(address), bytes, kind);
}

void require_aligned(const void* address, size_t align) {
    if (reinterpret_cast<uintptr_t>(address) % align != 0) {
        fail("touches %zu bytes at %p, which is no multiple of that", align, address);
    }
}

void copy_async(void* shared, const void* global, unsigned source_bytes) {
    Fiber& fiber = *machine->running;
    require_aligned(shared, 16);
    if (source_bytes > 16) fail("copies %u of 16 bytes", source_bytes);
    if (!is_shared(shared)) fail("copies to what is not shared memory");
    if (source_bytes > 0) {
        require_aligned(global, 16);
        if (is_shared(global)) fail("copies asynchronously from shared memory");
        touch_any(reinterpret_cast<uintptr_t>(global), source_bytes, Access::Read);
    }
    auto* to = static_cast<unsigned char*>(shared);
    touch_shared(static_cast<size_t>(to - machine->shared), 16, Access::Copy);
    if (fiber.copies == nullptr) fiber.copies = new PendingCopy[MAX_COPIES];
    if (fiber.num_copies == MAX_COPIES) fail("has more than %u copies on their way", MAX_COPIES);
    PendingCopy& copy = fiber.copies[fiber.num_copies++];
    copy = {to, {}, UINT32_MAX};
    if (source_bytes > 0) memcpy(copy.bytes, global, source_bytes);
    memset(to, 0xff, 16);
}

void commit_copies() {
    Fiber& fiber = *machine->running;
    for (unsigned index = 0; index < fiber.num_copies; index++) {
        if (fiber.copies[index].group == UINT32_MAX) fiber.copies[index].group = fiber.num_groups;
    }
    fiber.num_groups++;
}

void wait_copies(unsigned pending_groups) {
    Fiber& fiber = *machine->running;
    unsigned kept = 0;
    for (unsigned index = 0; index < fiber.num_copies; index++) {
        PendingCopy& copy = fiber.copies[index];
        if (copy.group == UINT32_MAX || copy.group + pending_groups >= fiber.num_groups) {
            fiber.copies[kept++] = copy;
        } else {
            complete(fiber, copy);
        }
    }
    fiber.num_copies = kept;
}

}  // namespace emulator

using emulator::Access;

extern "C" {

// The calls that the compiler puts before each access.
#define EMULATOR_ACCESS(name, bytes, access)                                                       \
    void name(void* address) { emulator::touch_any(reinterpret_cast<uintptr_t>(address), bytes, access); }
#define EMULATOR_ACCESSES(bytes)                                                \
    EMULATOR_ACCESS(__tsan_read##bytes, bytes, Access::Read)                    \
    EMULATOR_ACCESS(__tsan_write##bytes, bytes, Access::Write)                  \
    EMULATOR_ACCESS(__tsan_unaligned_read##bytes, bytes, Access::Read)          \
    EMULATOR_ACCESS(__tsan_unaligned_write##bytes, bytes, Access::Write)        \
    EMULATOR_ACCESS(__tsan_volatile_read##bytes, bytes, Access::Read)           \
    EMULATOR_ACCESS(__tsan_volatile_write##bytes, bytes, Access::Write)         \
    void __tsan_read_write##bytes(void* address) { __tsan_read##bytes(address), __tsan_write##bytes(address); }
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)

void __tsan_read_range(void* address, size_t bytes) {
    emulator::touch_any(reinterpret_cast<uintptr_t>(address), bytes, Access::Read);
}
void __tsan_write_range(void* address, size_t bytes) {
    emulator::touch_any(reinterpret_cast<uintptr_t>(address), bytes, Access::Write);
}
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return memcpy(to, from, bytes);
}
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    __tsan_read_range(const_cast<void*>(from), bytes), __tsan_write_range(to, bytes);
    return memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int byte, size_t bytes) {
    __tsan_write_range(to, bytes);
    return memset(to, byte, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

// Codes of the parameters of a kernel; null where there is none of that name.
__attribute__((visibility("default"))) const char* quire_emulator_parameters(const char* name) {
    for (const emulator::Kernel* kernel = emulator::first_kernel; kernel != nullptr; kernel = kernel->next) {
        if (strcmp(kernel->name, name) == 0) return kernel->parameters;
    }
    return nullptr;
}

// What a launch runs on; one at a time.
__attribute__((visibility("default"))) void* quire_emulator_new() { return new emulator::Machine; }
__attribute__((visibility("default"))) void quire_emulator_delete(void* machine) {
    delete static_cast<emulator::Machine*>(machine);
}

// Runs a grid. Gives 0, or writes what went wrong to `error` and gives 1; what buffers hold is not known then.
__attribute__((visibility("default"))) int quire_emulator_launch(void* on,
                                                                 const emulator::Request* request) {
    using namespace emulator;
    machine = static_cast<Machine*>(on);
    machine->request = request;
    machine->running = nullptr;
    machine->last_buffer = nullptr;
    machine->has_failed = false;
    machine->kernel = first_kernel;
    while (machine->kernel != nullptr && strcmp(machine->kernel->name, request->kernel) != 0) {
        machine->kernel = machine->kernel->next;
    }
    const Index3 dim = request->block, grid = request->grid;
    const uint64_t num_threads = uint64_t(dim.x) * dim.y * dim.z;
    machine->num_threads = static_cast<unsigned>(num_threads);
    if (machine->kernel == nullptr) {
        report("there is no such kernel");
    } else if (num_threads == 0 || num_threads % 32 != 0 || num_threads > machine->kernel->max_threads) {
        report("blocks of %u x %u x %u threads: not a whole number of warps, or more than %u threads", dim.x, dim.y,
               dim.z, machine->kernel->max_threads);
    } else if (request->shared_bytes > MAX_SHARED) {
        report("%u bytes of shared memory are more than there are", request->shared_bytes);
    } else if (grid.y > 65535 || grid.z > 65535) {
        report("a grid of %u x %u x %u blocks is too large", grid.x, grid.y, grid.z);
    }
    for (unsigned z = 0; z < grid.z && !machine->has_failed; z++) {
        for (unsigned y = 0; y < grid.y && !machine->has_failed; y++) {
            for (unsigned x = 0; x < grid.x && !machine->has_failed; x++) run_block({x, y, z});
        }
    }
    machine->running = nullptr;
    const bool has_failed = machine->has_failed;
    if (has_failed) machine->shadow.clear();
    forget_pages();
    machine = nullptr;
    return has_failed;
}
}
