// Who touched which byte of shared memory last, and whether those accesses are ordered.
//
// Time passes per warp: its clock moves at every `__syncwarp` and at every barrier that it takes part in. An access by a
// thread of warp v at time t is ordered before one by another thread of warp w when t < known[w][v]: barriers carry
// what their participants know to each other. Shuffles, votes and mma order nothing. Two accesses of one byte, one of them
// a write, that are not ordered are a race, whatever order they happened to run in. Atomics do not race with each other.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WARPS = MAX_THREADS / 32;

enum class Access { Read, Write, Atomic, Copy, CopyDone };

// What is wrong with an access, and which thread it conflicts with.
struct Conflict {
    const char* what = nullptr;
    unsigned other = 0;
};

class Shadow {
    static constexpr uint16_t PENDING = 1 << 15;
    static constexpr uint16_t ATOMIC = 1 << 14;
    static constexpr uint16_t THREAD = MAX_THREADS - 1;

    // Times of 0 stand for never. Two reads are kept: the last one, and the last one of another warp than that.
    struct Cell {
        uint32_t write_time;
        uint32_t read_times[2];
        uint16_t writer;
        uint16_t readers[2];
    };

    // Accesses of whole words are remembered by word, others by byte; a word that was accessed in parts says since which
    // block.
    std::vector<Cell> words;
    std::vector<Cell> bytes;
    std::vector<uint32_t> has_parts;
    uint32_t clock[MAX_WARPS];
    uint32_t known[MAX_WARPS][MAX_WARPS];
    uint32_t latest = 0;
    uint32_t start_of_block = 0;

    bool is_ordered(unsigned other, uint32_t time, unsigned thread) const {
        return other == thread || time < known[thread / 32][other / 32];
    }

public:
    explicit Shadow(size_t len) : words(len / 4), bytes(len), has_parts(len / 4) {}

    // A block begins: what the last one did is past.
    void start_block() {
        if (latest > UINT32_MAX / 2) {
            clear();
        }
        latest++;
        start_of_block = latest;
        for (unsigned warp = 0; warp < MAX_WARPS; warp++) {
            clock[warp] = latest;
            for (unsigned other = 0; other < MAX_WARPS; other++) known[warp][other] = latest;
        }
    }

    void clear() {
        for (Cell& cell : words) cell = Cell{};
        for (Cell& cell : bytes) cell = Cell{};
        for (uint32_t& block : has_parts) block = 0;
        latest = 0;
    }

    void sync_warp(unsigned warp) {
        clock[warp]++;
        known[warp][warp] = clock[warp];
        if (clock[warp] > latest) latest = clock[warp];
    }

    // `warps`: one bit for each that takes part.
    void sync_warps(uint32_t warps) {
        uint32_t joint[MAX_WARPS] = {};
        for (unsigned warp = 0; warp < MAX_WARPS; warp++) {
            if (!(warps >> warp & 1)) continue;
            sync_warp(warp);
            for (unsigned other = 0; other < MAX_WARPS; other++) {
                if (known[warp][other] > joint[other]) joint[other] = known[warp][other];
            }
        }
        for (unsigned warp = 0; warp < MAX_WARPS; warp++) {
            if (!(warps >> warp & 1)) continue;
            for (unsigned other = 0; other < MAX_WARPS; other++) known[warp][other] = joint[other];
        }
    }

    // Looks at an access and remembers it.
    Conflict touch(size_t start, size_t len, unsigned thread, Access access) {
        const size_t end = start + len;
        for (size_t at = start; at < end;) {
            const size_t word = at / 4;
            Conflict conflict;
            if (at % 4 == 0 && end - at >= 4) {
                conflict = visit<true>(words[word], thread, access);
                if (has_parts[word] == start_of_block) {
                    for (size_t byte = at; byte < at + 4 && conflict.what == nullptr; byte++) {
                        conflict = visit<false>(bytes[byte], thread, access);
                    }
                }
                at += 4;
            } else {
                has_parts[word] = start_of_block;
                conflict = visit<false>(words[word], thread, access);
                if (conflict.what == nullptr) conflict = visit<true>(bytes[at], thread, access);
                at++;
            }
            if (conflict.what != nullptr) return conflict;
        }
        return {};
    }

private:
    template <bool remembers> Conflict visit(Cell& cell, unsigned thread, Access access) {
        const unsigned writer = cell.writer & THREAD;
        if (cell.writer & PENDING && cell.write_time >= start_of_block) {
            if (access != Access::CopyDone || writer != thread) {
                return {"touches bytes of an asynchronous copy before its wait", writer};
            }
        }
        const bool is_atomic = access == Access::Atomic;
        if (!(is_atomic && cell.writer & ATOMIC) && !is_ordered(writer, cell.write_time, thread)) {
            return {access == Access::Read ? "reads what another thread writes, with no barrier between"
                                           : "writes where another thread writes, with no barrier between",
                    writer};
        }
        const uint32_t now = clock[thread / 32];
        if (access == Access::Read) {
            if (!remembers) return {};
            if (cell.readers[0] / 32 != thread / 32) {
                cell.readers[1] = cell.readers[0];
                cell.read_times[1] = cell.read_times[0];
            }
            cell.readers[0] = static_cast<uint16_t>(thread);
            cell.read_times[0] = now;
            return {};
        }
        for (unsigned slot = 0; slot < 2; slot++) {
            if (!is_ordered(cell.readers[slot], cell.read_times[slot], thread)) {
                return {"writes where another thread reads, with no barrier between", cell.readers[slot]};
            }
        }
        if (!remembers) return {};
        cell.writer = static_cast<uint16_t>(thread | (is_atomic ? ATOMIC : 0) | (access == Access::Copy ? PENDING : 0));
        cell.write_time = now;
        return {};
    }
};

}  // namespace emulator
