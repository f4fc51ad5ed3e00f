// Logits to tokens.
//
// A thread block has a row of logits. Probabilities are f32 relative to the largest, with the bits of cpu.rs, and summed as
// whole numbers of a fixed unit: such sums are exact, so that any order of adding gives the same bits. A row without filters
// is read twice. With filters, what none of them can leave is passed over first: of top-k, what is below the k-th of the
// threads' own maxima; of top-p, what together has less than top-p may cut away. The few candidates that are left are
// listed in ascending order, and each filter finds its threshold by bisection over the bits of its key, two bits a pass over
// the list, then over ids where equals are cut through (compare FlashInfer's sampling, which rejects instead). Generator:
// Philox4x32-10 (Salmon et al. 2011).
//
// Shared memory holds sums of warps only. Working memory for each token of the vocabulary: its changed logit, and a word that
// counts generated tokens, then lists candidates.

#include "exp2.cuh"
#include "fault.cuh"
#include "ordered.cuh"
#include "philox.cuh"
#include "warp.cuh"

using Mass = unsigned long long;

constexpr uint32_t NON_FINITE = 0xffffffffu;
constexpr uint32_t NOBODY = 0xffffffffu;
constexpr uint32_t PARAM_WORDS = 32;
constexpr uint32_t WAS_SEEN = 0x80000000u;
constexpr unsigned MAX_WARPS = 32;

// What a row's words say; see cuda.rs.
struct Params {
    const uint32_t* words;

    DEVICE uint32_t whole(unsigned index) const { return words[index]; }
    DEVICE float number(unsigned index) const { return __uint_as_float(words[index]); }
    DEVICE uint32_t prompt_len() const { return whole(0); }
    DEVICE float temperature() const { return number(4); }
    DEVICE uint32_t top_k() const { return whole(5); }
    DEVICE float top_p() const { return number(6); }
    DEVICE float min_p() const { return number(7); }
    DEVICE float typical_p() const { return number(8); }
    DEVICE float repetition_penalty() const { return number(9); }
    DEVICE float presence_penalty() const { return number(10); }
    DEVICE float frequency_penalty() const { return number(11); }
    DEVICE bool has_mask() const { return whole(12) != 0; }
    DEVICE uint32_t num_bias() const { return whole(13); }
    DEVICE uint32_t num_stop_token_ids() const { return whole(14); }
    DEVICE uint32_t min_tokens() const { return whole(15); }
    DEVICE uint32_t num_bad_words() const { return whole(16); }
    DEVICE bool has_penalties() const {
        return repetition_penalty() != 1.0f || presence_penalty() != 0.0f || frequency_penalty() != 0.0f;
    }
};

// Sums of warps, and what one thread tells the others.
struct Shared {
    Mass sums[3][MAX_WARPS];
    double numbers[MAX_WARPS];
    float floats[MAX_WARPS];
    uint32_t counts[MAX_WARPS];
    uint32_t found;
    Mass before;
};

// The block's row.
struct Row {
    Shared& shared;
    const float* logits;
    uint32_t vocab_size;
    // The largest logit, and what differences from it are multiplied by.
    float largest;
    float factor;
    // A weight of 1 is 2^one_shift: sums of a whole vocabulary fit.
    int one_shift;
    // Ids of candidates, ascending.
    uint32_t* list;
    uint32_t list_len;
    // Words of the list that were written at any time.
    uint32_t num_used;

    DEVICE float scaled(uint32_t id) const { return (logits[id] - largest) * factor; }
    DEVICE float weight(uint32_t id) const { return exp2_exact(scaled(id)); }

    // Whole units of a weight from 0 to 1, what is behind them cut off.
    DEVICE Mass mass_of(float weight) const {
        const uint32_t bits = __float_as_uint(weight);
        const int shift = static_cast<int>(bits >> 23) - 150 + one_shift;
        const Mass mantissa = (bits & 0x007fffffu) | 0x00800000u;
        if (bits < 0x00800000u || shift <= -24) return 0;
        return shift >= 0 ? mantissa << shift : mantissa >> -shift;
    }
    DEVICE Mass mass(uint32_t id) const { return mass_of(weight(id)); }
};

DEVICE Mass block_total(Mass own, Shared& shared) { return block_sum(own, shared.sums[0]); }

// The largest of `len` numbers; infinity where one is NaN, or where it is.
DEVICE float largest_or_infinite(const float* x, uint32_t len, Shared& shared) {
    float own = -INFINITY;
    for (uint32_t id = threadIdx.x; id < len; id += blockDim.x) {
        const float number = x[id];
        own = number != number ? INFINITY : max(own, number);
    }
    return block_max(own, shared.floats);
}

// The first id whose logit is the largest.
DEVICE uint32_t first_largest(const Row& row) {
    uint32_t own = row.vocab_size;
    for (uint32_t id = threadIdx.x; id < row.vocab_size; id += blockDim.x) {
        if (row.logits[id] == row.largest) {
            own = id;
            break;
        }
    }
    return block_min(own, row.shared.counts);
}

// Several threads may ban one token.
DEVICE void ban(float* logits, uint32_t id) {
    atomicExch(reinterpret_cast<uint32_t*>(&logits[id]), __float_as_uint(-INFINITY));
}

// Mask, bad words, stop tokens, bias and penalties: `logits` to `changed`. `tokens` are those that the row holds; `counts` is
// all zero, before and after.
DEVICE void change(const Params& params, const uint32_t* mask, const uint32_t* lists, const float* logits, float* changed,
                   uint32_t vocab_size, const uint32_t* tokens, uint32_t num_tokens, uint32_t* counts) {
    const uint32_t prompt_len = min(params.prompt_len(), num_tokens), num_generated = num_tokens - prompt_len;
    for (uint32_t id = threadIdx.x; id < vocab_size; id += blockDim.x) {
        const bool is_allowed = !params.has_mask() || (mask[id / 32] >> id % 32 & 1) != 0;
        changed[id] = is_allowed ? logits[id] : -INFINITY;
    }
    __syncthreads();

    const uint32_t num_bias = params.num_bias(), num_bad_words = params.num_bad_words();
    const uint32_t* bias_ids = lists;
    const uint32_t* bias_values = bias_ids + num_bias;
    const uint32_t* stop_token_ids = bias_values + num_bias;
    const uint32_t* word_lens = stop_token_ids + params.num_stop_token_ids();
    const uint32_t* words = word_lens + num_bad_words;
    for (uint32_t index = threadIdx.x; index < num_bad_words; index += blockDim.x) {
        uint32_t start = 0;
        for (uint32_t other = 0; other < index; other++) start += word_lens[other];
        const uint32_t before_len = word_lens[index] - 1;
        bool matches = before_len <= num_generated;
        for (uint32_t i = 0; i < before_len && matches; i++) {
            matches = words[start + i] == tokens[num_tokens - before_len + i];
        }
        if (matches) ban(changed, words[start + before_len]);
    }
    if (num_generated < params.min_tokens()) {
        for (uint32_t index = threadIdx.x; index < params.num_stop_token_ids(); index += blockDim.x) {
            ban(changed, stop_token_ids[index]);
        }
    }
    __syncthreads();

    // Whoever has the first entry of an id adds all of that id, in order.
    for (uint32_t index = threadIdx.x; index < num_bias; index += blockDim.x) {
        const uint32_t id = bias_ids[index];
        bool is_first = true;
        for (uint32_t other = 0; other < index && is_first; other++) is_first = bias_ids[other] != id;
        if (!is_first) continue;
        float x = changed[id];
        for (uint32_t other = index; other < num_bias; other++) {
            if (bias_ids[other] == id) x += __uint_as_float(bias_values[other]);
        }
        changed[id] = x;
    }
    if (!params.has_penalties()) {
        __syncthreads();
        return;
    }

    // Tokens that are no entry of the vocabulary (of an image, say) have no logit.
    for (uint32_t index = threadIdx.x; index < num_tokens; index += blockDim.x) {
        const uint32_t token = tokens[index];
        if (token >= vocab_size) continue;
        if (index < prompt_len) atomicOr(&counts[token], WAS_SEEN);
        else atomicAdd(&counts[token], 1u);
    }
    __syncthreads();
    for (uint32_t index = threadIdx.x; index < num_tokens; index += blockDim.x) {
        const uint32_t token = tokens[index];
        if (token >= vocab_size) continue;
        // Whoever takes the count applies it.
        const uint32_t seen = atomicExch(&counts[token], 0u);
        if (seen == 0) continue;
        float x = changed[token];
        x = x > 0.0f ? x / params.repetition_penalty() : x * params.repetition_penalty();
        const uint32_t count = seen & ~WAS_SEEN;
        if (count > 0) {
            x -= params.frequency_penalty() * static_cast<float>(count) + params.presence_penalty();
        }
        changed[token] = x;
    }
    __syncthreads();
}

// The first of `len` places at which the running sum of `mass_at` is above `target`, which is below the sum of all.
template <class MassAt> DEVICE uint32_t first_above(uint32_t len, Mass target, Shared& shared, MassAt mass_at) {
    const unsigned num_warps = blockDim.x / 32;
    uint32_t start = 0;
    Mass before = 0;
    // To the warp's part that it is in, until a part has a number for each thread at most.
    while (len > blockDim.x) {
        const uint32_t part = (len + num_warps - 1) / num_warps;
        const uint32_t from = min(warp_index() * part, len), to = min(from + part, len);
        Mass own = 0;
        for (uint32_t i = from + lane_index(); i < to; i += 32) own += mass_at(start + i);
        own = warp_sum(own);
        if (lane_index() == 0) shared.sums[0][warp_index()] = own;
        __syncthreads();
        // The warp whose part the target is in, and the sum before it.
        const Mass of_warp = of_lane_warp(shared.sums[0], Mass(0)), up_to = before + warp_running_sum(of_warp);
        const unsigned warp = __popc(__ballot_sync(ALL_LANES, lane_index() < num_warps && up_to <= target));
        before = __shfl_sync(ALL_LANES, up_to - of_warp, static_cast<int>(warp));
        __syncthreads();
        const uint32_t skipped = min(warp * part, len);
        start += skipped;
        len = min(part, len - skipped);
    }
    const Mass own = threadIdx.x < len ? mass_at(start + threadIdx.x) : 0;
    const Mass running = warp_running_sum(own);
    if (lane_index() == 31) shared.sums[0][warp_index()] = running;
    __syncthreads();
    before += warp_sum(lane_index() < warp_index() ? shared.sums[0][lane_index()] : Mass(0));
    if (before + running - own <= target && before + running > target) shared.found = start + threadIdx.x;
    __syncthreads();
    const uint32_t found = shared.found;
    __syncthreads();
    return found;
}

// Lists the ids of `source(place)`, `len` of them ascending, that `is_kept` is true for, in the same order. The list may be
// the source: writing never overtakes reading.
template <class Source, class IsKept> DEVICE void keep(Row& row, uint32_t len, Source source, IsKept is_kept) {
    // Places of a thread in a tile, a block's threads apart. Counts of them all fit one word, 16 bits each.
    constexpr uint32_t NUM_PARTS = 4;
    uint32_t num_kept = 0;
    UNROLL_BY(1)
    for (uint32_t tile = 0; tile < len; tile += NUM_PARTS * blockDim.x) {
        uint32_t ids[NUM_PARTS], ballots[NUM_PARTS];
        Mass counts = 0;
        UNROLL
        for (uint32_t part = 0; part < NUM_PARTS; part++) {
            const uint32_t place = tile + part * blockDim.x + threadIdx.x;
            ids[part] = place < len ? source(place) : 0;
            ballots[part] = __ballot_sync(ALL_LANES, place < len && is_kept(ids[part]));
            counts |= static_cast<Mass>(__popc(ballots[part])) << (16 * part);
        }
        if (lane_index() == 0) row.shared.sums[0][warp_index()] = counts;
        __syncthreads();
        const Mass of_warp = of_lane_warp(row.shared.sums[0], Mass(0));
        const Mass of_lower = warp_sum(lane_index() < warp_index() ? of_warp : 0), of_all = warp_sum(of_warp);
        UNROLL
        for (uint32_t part = 0; part < NUM_PARTS; part++) {
            const uint32_t before = static_cast<uint32_t>(of_lower >> (16 * part)) & 0xffff;
            const uint32_t of_lanes = __popc(ballots[part] & ((1u << lane_index()) - 1));
            if (ballots[part] >> lane_index() & 1) row.list[num_kept + before + of_lanes] = ids[part];
            num_kept += static_cast<uint32_t>(of_all >> (16 * part)) & 0xffff;
        }
        __syncthreads();
    }
    row.list_len = num_kept;
    row.num_used = max(row.num_used, num_kept);
}

template <class IsKept> DEVICE void keep_of_all(Row& row, IsKept is_kept) {
    keep(row, row.vocab_size, [](uint32_t place) { return place; }, is_kept);
}

template <class IsKept> DEVICE void keep_of_list(Row& row, IsKept is_kept) {
    const uint32_t* list = row.list;
    keep(row, row.list_len, [=](uint32_t place) { return list[place]; }, is_kept);
}

// The smallest number of `bits` bits (an even number of them) for which `sum_up_to`, a thread's part of a sum that grows with
// it, is at least `target` over the block; all ones where none is.
template <class SumUpTo> DEVICE uint32_t smallest_reaching(int bits, Mass target, Shared& shared, SumUpTo sum_up_to) {
    uint32_t found = 0;
    UNROLL_BY(1)
    for (int bit = bits - 2; bit >= 0; bit -= 2) {
        Mass sums[3] = {};
        const uint32_t step = 1u << bit;
        sum_up_to(sums, found + step - 1, found + 2 * step - 1, found + 3 * step - 1);
        UNROLL
        for (int i = 0; i < 3; i++) {
            const Mass of_warp = warp_sum(sums[i]);
            if (lane_index() == 0) shared.sums[i][warp_index()] = of_warp;
        }
        __syncthreads();
        uint32_t digit = 0;
        UNROLL
        for (int i = 0; i < 3; i++) {
            digit += warp_sum(of_lane_warp(shared.sums[i], Mass(0))) < target ? 1 : 0;
        }
        __syncthreads();
        found += digit * step;
    }
    return found;
}

// Keeps the candidates with the smallest keys, lower id first among equals, whose amounts together reach `target`.
template <class KeyOf, class AmountOf> DEVICE void keep_first(Row& row, Mass target, KeyOf key_of, AmountOf amount_of) {
    const Row& now = row;
    const auto each = [&](auto visit) {
        UNROLL_BY(1)
        for (uint32_t place = threadIdx.x; place < now.list_len; place += blockDim.x) {
            const uint32_t id = now.list[place];
            visit(key_of(id), id);
        }
    };
    const uint32_t last_key = smallest_reaching(32, target, row.shared, [&](Mass (&sums)[3], uint32_t a, uint32_t b, uint32_t c) {
        each([&](uint32_t key, uint32_t id) {
            if (key > c) return;
            const Mass amount = amount_of(id);
            sums[2] += amount;
            sums[1] += key <= b ? amount : 0;
            sums[0] += key <= a ? amount : 0;
        });
    });
    Mass below = 0, num_equal = 0;
    each([&](uint32_t key, uint32_t id) {
        below += key < last_key ? amount_of(id) : 0;
        num_equal += key == last_key ? 1 : 0;
    });
    below = block_total(below, row.shared);
    num_equal = block_total(num_equal, row.shared);
    uint32_t last_id = row.vocab_size;
    if (num_equal > 1) {
        const int bits = (32 - __clz(static_cast<int>(row.vocab_size)) + 1) / 2 * 2;
        const Mass rest = target > below ? target - below : 0;
        last_id = smallest_reaching(bits, rest, row.shared, [&](Mass (&sums)[3], uint32_t a, uint32_t b, uint32_t c) {
            each([&](uint32_t key, uint32_t id) {
                if (key != last_key || id > c) return;
                const Mass amount = amount_of(id);
                sums[2] += amount;
                sums[1] += id <= b ? amount : 0;
                sums[0] += id <= a ? amount : 0;
            });
        });
    }
    keep_of_list(row, [=](uint32_t id) {
        const uint32_t key = key_of(id);
        return key < last_key || (key == last_key && id <= last_id);
    });
}

// Ascending keys are descending logits.
DEVICE uint32_t key_of_logit(const float* logits, uint32_t id) { return ~ordered(logits[id]); }

// Lists the `k` largest logits, which are fewer than all.
DEVICE void keep_largest(Row& row, uint32_t k) {
    // The k-th of the threads' own maxima is no larger than the k-th of all.
    uint32_t limit = 0xffffffffu;
    if (k <= blockDim.x) {
        uint32_t own = 0xffffffffu;
        for (uint32_t id = threadIdx.x; id < row.vocab_size; id += blockDim.x) own = min(own, key_of_logit(row.logits, id));
        limit = smallest_reaching(32, k, row.shared, [=](Mass (&sums)[3], uint32_t a, uint32_t b, uint32_t c) {
            sums[0] = own <= a ? 1 : 0;
            sums[1] = own <= b ? 1 : 0;
            sums[2] = own <= c ? 1 : 0;
        });
    }
    const float* logits = row.logits;
    keep_of_all(row, [=](uint32_t id) { return key_of_logit(logits, id) <= limit; });
    keep_first(row, k, [=](uint32_t id) { return key_of_logit(logits, id); }, [](uint32_t) { return Mass(1); });
}

// At least one unit, at most all of `total`.
DEVICE Mass part_of(Mass total, float part) {
    const double mass = ceil(static_cast<double>(part) * static_cast<double>(total));
    return mass < 1.0 ? 1 : mass >= static_cast<double>(total) ? total : static_cast<Mass>(mass);
}

DEVICE Mass total_of_list(const Row& row) {
    Mass own = 0;
    UNROLL_BY(1)
    for (uint32_t place = threadIdx.x; place < row.list_len; place += blockDim.x) own += row.mass(row.list[place]);
    return block_total(own, row.shared);
}

// Top-p: the most likely candidates that together reach `target`.
DEVICE void keep_likely(Row& row, Mass target) {
    const Row now = row;
    keep_first(row, target, [now](uint32_t id) { return ~__float_as_uint(now.weight(id)); },
               [now](uint32_t id) { return now.mass(id); });
}

// Typical-p: those whose surprise is nearest to the mean.
DEVICE void keep_typical(Row& row, float part) {
    // The exponent of a weight, without its rounding: weights near zero have few bits.
    const auto log_weight = [](const Row& row, uint32_t id) { return static_cast<double>(row.scaled(id)) * 0.6931471824645996; };
    double weights = 0.0, weighted = 0.0;
    UNROLL_BY(1)
    for (uint32_t place = threadIdx.x; place < row.list_len; place += blockDim.x) {
        const uint32_t id = row.list[place];
        const double weight = static_cast<double>(row.weight(id));
        // One that was rounded to zero has no part in the mean, however surprising it is.
        if (weight > 0.0) {
            weights += weight;
            weighted += weight * log_weight(row, id);
        }
    }
    weights = block_sum(weights, row.shared.numbers);
    const double mean = block_sum(weighted, row.shared.numbers) / weights;
    const Mass target = part_of(total_of_list(row), part);
    const Row now = row;
    const auto distance = [=](uint32_t id) {
        return __float_as_uint(static_cast<float>(fabs(log_weight(now, id) - mean)));
    };
    keep_first(row, target, distance, [now](uint32_t id) { return now.mass(id); });
}

// The draw times the sum, which it stays below.
DEVICE Mass drawn(double uniform, Mass total) {
    const Mass target = static_cast<Mass>(uniform * static_cast<double>(total));
    return min(target, total - 1);
}

// One token by its probability.
DEVICE uint32_t draw(Row& row, const Params& params, double uniform) {
    const uint32_t top_k = params.top_k();
    const float top_p = params.top_p(), min_p = params.min_p(), typical_p = params.typical_p();
    if (top_k > 0 && top_k < row.vocab_size) {
        keep_largest(row, top_k);
        if (min_p > 0.0f) {
            const Row now = row;
            keep_of_list(row, [=](uint32_t id) { return now.weight(id) >= min_p; });
        }
    } else {
        const bool has_only_top_p = min_p <= 0.0f && typical_p >= 1.0f;
        Mass total = 0;
        if (has_only_top_p) {
            for (uint32_t id = threadIdx.x; id < row.vocab_size; id += blockDim.x) total += row.mass(id);
            total = block_total(total, row.shared);
            if (top_p >= 1.0f) {
                const Row& now = row;
                return first_above(row.vocab_size, drawn(uniform, total), row.shared,
                                   [&](uint32_t id) { return now.mass(id); });
            }
        }
        // The smallest full number, or more: all below it together have less than what may be cut away. One part in 1024
        // covers rounding.
        float limit = __uint_as_float(0x00800000u);
        if (min_p > 0.0f) {
            limit = max(limit, min_p);
        } else if (has_only_top_p) {
            const double unit = __longlong_as_double(static_cast<long long>(1023 - row.one_shift) << 52);
            const double cut_away = max(1.0 - static_cast<double>(top_p), 0.0) * static_cast<double>(total) * unit;
            const double share = cut_away / static_cast<double>(row.vocab_size) * (1023.0 / 1024.0);
            limit = min(max(limit, static_cast<float>(share) * (1023.0f / 1024.0f)), 1.0f);
        }
        const Row now = row;
        keep_of_all(row, [=](uint32_t id) { return now.weight(id) >= limit; });
        if (has_only_top_p) keep_likely(row, part_of(total, top_p));
    }
    if (typical_p < 1.0f) keep_typical(row, typical_p);
    const bool is_done = !(top_k > 0 && top_k < row.vocab_size) && min_p <= 0.0f && typical_p >= 1.0f;
    if (top_p < 1.0f && !is_done) keep_likely(row, part_of(total_of_list(row), top_p));
    const Row& now = row;
    const Mass target = drawn(uniform, total_of_list(row));
    return row.list[first_above(row.list_len, target, row.shared, [&](uint32_t place) { return now.mass(now.list[place]); })];
}

// Row i = blockIdx.x of logits; rows[2 * i] is its row of the tables (UINT32_MAX: nobody), rows[2 * i + 1] the tokens that
// it holds. See cuda.rs for the words of params and lists. scratch: two words for each row of logits and token of the
// vocabulary, [num_rows][2][vocab_size]; the second is 0 at the start of the very first launch and 0 again at the end of each.
// Writes the token, or UINT32_MAX, to out[i], and appends it (0 for UINT32_MAX) to its row of the token table where that
// has room.
KERNEL(sample, (1024), const float* logits, const uint32_t* rows, const uint32_t* params, const uint32_t* masks,
       const uint32_t* lists, uint32_t list_words, uint32_t max_num_seqs, uint32_t max_model_len, uint32_t vocab_size,
       uint32_t* scratch, uint32_t* token_table, uint32_t* out, uint32_t* fault_row, uint32_t* fault_num_tokens) {
    SHARED_ARRAY(Shared, all_shared, 1);
    Shared& shared = all_shared[0];
    const uint32_t row_index = rows[2 * blockIdx.x], num_tokens = rows[2 * blockIdx.x + 1];
    if (row_index == NOBODY) return;
    if (row_index >= max_num_seqs) {
        if (threadIdx.x == 0) report_fault(fault_row, row_index, max_num_seqs);
        return;
    }
    if (num_tokens > max_model_len) {
        if (threadIdx.x == 0) report_fault(fault_num_tokens, num_tokens, max_model_len + 1);
        return;
    }
    const Params own = {params + size_t(row_index) * PARAM_WORDS};
    const uint32_t* tokens = token_table + size_t(row_index) * max_model_len;
    auto* changed = reinterpret_cast<float*>(scratch + 2 * size_t(blockIdx.x) * vocab_size);
    uint32_t* counts = scratch + (2 * size_t(blockIdx.x) + 1) * vocab_size;
    Row row = {shared, logits + size_t(blockIdx.x) * vocab_size, vocab_size, 0.0f, 0.0f, 0, counts, 0, 0};
    // 63 bits for the sum of a vocabulary of weights of 1.
    row.one_shift = min(63 - (32 - __clz(static_cast<int>(vocab_size))), 45);

    uint32_t token = NON_FINITE;
    row.largest = largest_or_infinite(row.logits, vocab_size, shared);
    const uint32_t num_generated = num_tokens - min(own.prompt_len(), num_tokens);
    const bool is_changed = own.has_mask() || own.num_bad_words() > 0 || own.num_bias() > 0 || own.has_penalties() ||
                            (num_generated < own.min_tokens() && own.num_stop_token_ids() > 0);
    if (isfinite(row.largest) && is_changed) {
        const size_t mask_words = (size_t(vocab_size) + 31) / 32;
        change(own, masks + row_index * mask_words, lists + size_t(row_index) * list_words, row.logits, changed, vocab_size,
               tokens, num_tokens, counts);
        row.logits = changed;
        row.largest = largest_or_infinite(changed, vocab_size, shared);
    }
    if (isfinite(row.largest)) {
        if (own.temperature() == 0.0f) {
            token = first_largest(row);
        } else {
            // A temperature near zero must not make zero times infinity.
            row.factor = min(1.44269504f / own.temperature(), 3.402823466e38f);
            token = draw(row, own, philox_uniform(own.whole(1), own.whole(2), own.whole(3), num_tokens));
        }
    }
    __syncthreads();
    for (uint32_t place = threadIdx.x; place < row.num_used; place += blockDim.x) counts[place] = 0;
    if (threadIdx.x == 0) {
        out[blockIdx.x] = token;
        if (num_tokens < max_model_len) {
            token_table[size_t(row_index) * max_model_len + num_tokens] = token == NON_FINITE ? 0 : token;
        }
    }
}
