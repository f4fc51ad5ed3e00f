// x to fragments, by all thread blocks of a launch together, before the product that reads them.
#pragma once

#include "memory.cuh"
#include "numbers.cuh"
#include "sums.cuh"
#include "warp.cuh"
#include "weight.cuh"

namespace {

// What is rounded where to.
struct Rounding {
    // [num_rows][in_features]
    const float* x;
    uint8_t* to;
    // Tickets taken, tickets done, thread blocks that went on; zeros before and after.
    uint32_t* counts;
    uint32_t num_rows;
    uint32_t in_features;
    uint32_t num_stages;
    // Pieces that a warp rounds at a time, and how many of them a ticket is.
    uint32_t num_units;
    uint32_t ticket_units;
};

// Numbers of the rounding's counts, in front of others.
constexpr int ROUND_COUNTS = 4;

// x to the B fragments of m16n8k16: [tile of 16 tokens][16 input features][lane][two tiles of 8 tokens][2] pairs of bf16,
// zeros where there is no row or feature. A unit is 16 tokens and 16 features.
struct ToBf16 {
    static constexpr int NUMBERS = 8;

    DEVICE static void load(const Rounding& job, const Norm& norm, uint32_t unit, float (&numbers)[NUMBERS]) {
        const uint32_t steps = job.num_stages * (BF16_STAGE_FEATURES / 16);
        const uint32_t step = unit % steps;
        const uint32_t tile = unit / steps;
        const uint32_t lane = lane_index();
        UNROLL
        for (int i = 0; i < NUMBERS; ++i) {
            const uint32_t row = tile * 16 + i / 4 * 8 + lane / 4;
            const uint32_t feature = step * 16 + i / 2 % 2 * 8 + lane % 4 * 2 + i % 2;
            const bool is_there = row < job.num_rows && feature < job.in_features;
            numbers[i] = is_there ? job.x[size_t(row) * job.in_features + feature] : 0.0f;
            if (norm.weight) {
                numbers[i] *= feature < job.in_features ? norm.weight[feature] : 0.0f;
            }
        }
    }

    DEVICE static void store(const Rounding& job, const Norm&, uint32_t unit, const float (&numbers)[NUMBERS]) {
        Bytes16 words;
        UNROLL
        for (int i = 0; i < 4; ++i) {
            words.word[i] = floats_to_bf16_pair(numbers[2 * i], numbers[2 * i + 1]);
        }
        store_16(job.to + (size_t(unit) * 32 + lane_index()) * 16, words);
    }
};

// x to the B fragments of m16n8k32, by groups: [tile of 16 tokens][stage of 128 input features]: codes [32 features][lane]
// [two tiles of 8 tokens][8], then for each group 16 scales and 16 sums of codes times their scale. A unit is a token's part
// of a stage.
template <int GROUP_LEN>
struct ToInt8 {
    static constexpr int NUMBERS = 4;
    static constexpr int LANES_OF_GROUP = GROUP_LEN / NUMBERS;
    static constexpr int GROUPS = INT8_STAGE_FEATURES / GROUP_LEN;

    DEVICE static void load(const Rounding& job, const Norm& norm, uint32_t unit, float (&numbers)[NUMBERS]) {
        const uint32_t stage = unit % job.num_stages;
        const uint32_t row = unit / job.num_stages;
        UNROLL
        for (int i = 0; i < NUMBERS; ++i) {
            const uint32_t feature = stage * INT8_STAGE_FEATURES + lane_index() * NUMBERS + i;
            const bool is_there = row < job.num_rows && feature < job.in_features;
            numbers[i] = is_there ? job.x[size_t(row) * job.in_features + feature] : 0.0f;
            if (norm.weight && is_there) {
                numbers[i] *= norm.weight[feature];
            }
        }
    }

    DEVICE static void store(const Rounding& job, const Norm& norm, uint32_t unit, const float (&numbers)[NUMBERS]) {
        const uint32_t lane = lane_index();
        const uint32_t stage = unit % job.num_stages;
        const uint32_t row = unit / job.num_stages;
        float largest = 0.0f;
        float poison = 0.0f;
        UNROLL
        for (int i = 0; i < NUMBERS; ++i) {
            const float magnitude = fabsf(numbers[i]);
            largest = magnitude > largest ? magnitude : largest;
            // NaN where the number is not finite.
            poison += numbers[i] * 0.0f;
        }
        UNROLL
        for (int apart = 1; apart < LANES_OF_GROUP; apart *= 2) {
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, apart));
            poison += __shfl_xor_sync(ALL_LANES, poison, apart);
        }
        const bool is_zero = largest < 1e-30f;
        const float factor = is_zero ? 0.0f : 127.0f / largest;
        int32_t sum = 0;
        uint32_t word = 0;
        UNROLL
        for (int i = 0; i < NUMBERS; ++i) {
            const float scaled = numbers[i] * factor;
            // Nothing that is not finite is turned into a whole number.
            const int32_t code = poison == 0.0f ? __float2int_rn(scaled) : 0;
            sum += code;
            word |= (uint32_t(code) & 0xffu) << (8 * i);
        }
        UNROLL
        for (int apart = 1; apart < LANES_OF_GROUP; apart *= 2) {
            sum += __shfl_xor_sync(ALL_LANES, sum, apart);
        }
        const float row_factor = norm.weight && row < job.num_rows ? norm_factor(norm, row) : 1.0f;
        const float scale = (is_zero ? 0.0f : largest / 127.0f) * row_factor + poison;
        constexpr size_t BYTES = 16 * INT8_STAGE_FEATURES + GROUPS * 128;
        uint8_t* tile = job.to + (size_t(row / 16) * job.num_stages + stage) * BYTES;
        const uint32_t target_lane = row % 8 * 4 + lane % 4;
        const uint32_t at = (lane / 8 * 32 + target_lane) * 16 + row % 16 / 8 * 8 + lane % 8 / 4 * 4;
        *reinterpret_cast<uint32_t*>(tile + at) = word;
        if (lane % LANES_OF_GROUP == 0) {
            float* scales = reinterpret_cast<float*>(tile + 16 * INT8_STAGE_FEATURES + lane / LANES_OF_GROUP * 128);
            scales[row % 16] = scale;
            scales[16 + row % 16] = scale * float(sum);
        }
    }
};

// Rounds as many tickets as there are for this thread block, and returns when all are rounded, whoever did it. Who waits has
// none left: it waits for thread blocks that are at work, never for one that has not begun.
template <int THREADS, class Form>
DEVICE void round_together(const Rounding& job, const Norm& norm) {
    constexpr int WARPS = THREADS / 32;
    // Units of a warp whose loads are on their way together.
    constexpr int AT_ONCE = 2;
    const uint32_t num_tickets = (job.num_units + job.ticket_units - 1) / job.ticket_units;
    SHARED_ARRAY(uint32_t, ticket, 1);
    for (;;) {
        if (threadIdx.x == 0) {
            // Later thread blocks find all done.
            ticket[0] = load_acquire(job.counts + 1) == num_tickets ? num_tickets : atomicAdd(job.counts, 1u);
        }
        __syncthreads();
        const uint32_t own = ticket[0];
        if (own >= num_tickets) {
            break;
        }
        const uint32_t first = own * job.ticket_units;
        const uint32_t end = min(first + job.ticket_units, job.num_units);
        UNROLL_BY(1)
        for (uint32_t unit = first + warp_index(); unit < end; unit += AT_ONCE * WARPS) {
            float numbers[AT_ONCE][Form::NUMBERS];
            UNROLL
            for (int i = 0; i < AT_ONCE; ++i) {
                if (unit + i * WARPS < end) {
                    Form::load(job, norm, unit + i * WARPS, numbers[i]);
                }
            }
            UNROLL
            for (int i = 0; i < AT_ONCE; ++i) {
                if (unit + i * WARPS < end) {
                    Form::store(job, norm, unit + i * WARPS, numbers[i]);
                }
            }
        }
        // What all threads wrote is there before the count says so.
        __syncthreads();
        if (threadIdx.x == 0) {
            add_acquire_release(job.counts + 1, 1);
        }
    }
    if (threadIdx.x == 0) {
        wait_for_flag(job.counts + 1, num_tickets);
        if (add_acquire_release(job.counts + 2, 1) + 1 == gridDim.x * gridDim.y * gridDim.z) {
            // Nobody looks at them any more: as they were found, for the next launch.
            job.counts[0] = 0;
            job.counts[1] = 0;
            job.counts[2] = 0;
        }
    }
    __syncthreads();
}

}  // namespace
