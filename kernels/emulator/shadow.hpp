// Who touched which byte of memory last, and whether those accesses are ordered.
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

// Times of warps, and what each knows of the others'.
class Clocks {
    uint32_t clock[MAX_WARPS];
    uint32_t known[MAX_WARPS][MAX_WARPS];
    uint32_t latest = 0;

public:
    uint32_t start_of_block = 0;

    uint32_t now(unsigned thread) const { return clock[thread / 32]; }

    bool is_ordered(unsigned other, uint32_t time, unsigned thread) const {
        return other == thread || time < known[thread / 32][other / 32];
    }

    // A block begins: what the last one did is past. True where time begins anew, and all that was remembered is to be
    // forgotten.
    bool start_block() {
        const bool is_anew = latest > UINT32_MAX / 2;
        if (is_anew) latest = 0;
        latest++;
        start_of_block = latest;
        for (unsigned warp = 0; warp < MAX_WARPS; warp++) {
            clock[warp] = latest;
            for (unsigned other = 0; other < MAX_WARPS; other++) known[warp][other] = latest;
        }
        return is_anew;
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
};

// What is remembered of a range of memory.
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

    const Clocks& clocks;
    // Accesses of whole words are remembered by word, others by byte; a word that was accessed in parts says since which
    // block. There is no room for bytes before any is accessed.
    std::vector<Cell> words;
    std::vector<Cell> bytes;
    std::vector<uint32_t> has_parts;

public:
    // The range begins on a multiple of 4.
    Shadow(const Clocks& clocks, size_t len) : clocks(clocks), words(len / 4), has_parts(len / 4) {}

    void clear() {
        for (Cell& cell : words) cell = Cell{};
        for (Cell& cell : bytes) cell = Cell{};
        for (uint32_t& block : has_parts) block = 0;
    }

    // Looks at an access and remembers it.
    Conflict touch(size_t start, size_t len, unsigned thread, Access access) {
        const size_t end = start + len;
        for (size_t at = start; at < end;) {
            const size_t word = at / 4;
            Conflict conflict;
            if (at % 4 == 0 && end - at >= 4) {
                conflict = visit<true>(words[word], thread, access);
                if (has_parts[word] == clocks.start_of_block) {
                    for (size_t byte = at; byte < at + 4 && conflict.what == nullptr; byte++) {
                        conflict = visit<false>(bytes[byte], thread, access);
                    }
                }
                at += 4;
            } else {
                if (bytes.empty()) bytes.resize(4 * words.size());
                has_parts[word] = clocks.start_of_block;
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
        if (cell.writer & PENDING && cell.write_time >= clocks.start_of_block) {
            if (access != Access::CopyDone || writer != thread) {
                return {"touches bytes of an asynchronous copy before its wait", writer};
            }
        }
        const bool is_atomic = access == Access::Atomic;
        if (!(is_atomic && cell.writer & ATOMIC) && !clocks.is_ordered(writer, cell.write_time, thread)) {
            return {access == Access::Read ? "reads what another thread writes, with no barrier between"
                                           : "writes where another thread writes, with no barrier between",
                    writer};
        }
        const uint32_t now = clocks.now(thread);
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
            if (!clocks.is_ordered(cell.readers[slot], cell.read_times[slot], thread)) {
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
