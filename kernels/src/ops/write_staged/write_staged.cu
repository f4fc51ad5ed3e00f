// Many small pieces of one upload to their places.
//
// A thread block has a piece and copies it, a word a thread: pieces are a few words of a decode step, or the arrays of some
// thousand tokens. No shared memory. Launching is the limit.

#include "platform.cuh"

// Of `words`: for each piece where it goes (low and high half of the address), where it begins among `words`, and how many words
// it has; then the pieces. piece = blockIdx.x
KERNEL(write_staged, (256), const uint32_t* words) {
    const uint32_t* piece = words + 4 * blockIdx.x;
    uint32_t* to = reinterpret_cast<uint32_t*>(uintptr_t(uint64_t(piece[0]) | uint64_t(piece[1]) << 32));
    const uint32_t* from = words + piece[2];
    const uint32_t len = piece[3];
    for (uint32_t i = threadIdx.x; i < len; i += blockDim.x) to[i] = from[i];
}
