// From the fused projection to rotated queries and a written cache.
//
// A thread block has a token and a KV head: the queries of the group, the key, the value. A warp has one of these vectors at a
// time; lane l holds dimensions l, l + 32, ... of its first half and the same of its second, so that the two numbers that
// turn with each other are in one lane. Squares are summed by lane, then over lanes as in warp.cuh: an order that head_dim
// fixes. No shared memory. A launch moves some hundred bytes per block: launching is the limit.

#include "fault.cuh"
#include "numbers.cuh"
#include "warp.cuh"

// Numbers of each half that a lane holds, of the largest head_dim.
constexpr uint32_t MAX_PER_LANE = 4;

struct Vector {
    float first[MAX_PER_LANE];
    float second[MAX_PER_LANE];
};

DEVICE Vector load_vector(const float* from, uint32_t half) {
    Vector v;
    UNROLL
    for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
        const uint32_t i = lane_index() + 32 * j;
        v.first[j] = i < half ? from[i] : 0.0f;
        v.second[j] = i < half ? from[i + half] : 0.0f;
    }
    return v;
}

// x / sqrt(mean(x^2) + eps) * weight
DEVICE void normalize(Vector& v, const float* weight, float eps, uint32_t half) {
    float sum = 0.0f;
    UNROLL
    for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
        sum = fmaf(v.first[j], v.first[j], sum);
        sum = fmaf(v.second[j], v.second[j], sum);
    }
    const float factor = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(2 * half) + eps);
    UNROLL
    for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
        const uint32_t i = lane_index() + 32 * j;
        if (i >= half) continue;
        v.first[j] = v.first[j] * factor * weight[i];
        v.second[j] = v.second[j] * factor * weight[i + half];
    }
}

// Turns dimension i with i + half.
DEVICE void rotate(Vector& v, const float* cos_sin, uint32_t half) {
    UNROLL
    for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
        const uint32_t i = lane_index() + 32 * j;
        if (i >= half) continue;
        const float cosine = cos_sin[2 * i], sine = cos_sin[2 * i + 1];
        const float first = v.first[j], second = v.second[j];
        v.first[j] = first * cosine - second * sine;
        v.second[j] = second * cosine + first * sine;
    }
}

// How numbers become those of the cache. `INTERLEAVED` numbers lie in pairs: see KvLayout.
struct AsF32 {
    using Number = float;
    static constexpr uint32_t INTERLEAVED = 1;
    static constexpr bool HAS_SCALES = false;
    DEVICE static float prepare(const Vector&) { return 1.0f; }
    DEVICE static float convert(float x, float) { return x; }
};

struct AsBf16 {
    using Number = uint16_t;
    static constexpr uint32_t INTERLEAVED = 2;
    static constexpr bool HAS_SCALES = false;
    DEVICE static float prepare(const Vector&) { return 1.0f; }
    DEVICE static uint16_t convert(float x, float) { return float_to_bf16(x); }
};

// Codes times a scale, see kv_layout.rs.
template <class Code>
struct AsCodes {
    using Number = typename Code::Number;
    static constexpr uint32_t INTERLEAVED = 2;
    static constexpr bool HAS_SCALES = true;

    // The largest magnitude; NaN where a number is not finite.
    DEVICE static float prepare(const Vector& v) {
        float largest = 0.0f;
        bool is_finite = true;
        UNROLL
        for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
            largest = max(largest, max(fabsf(v.first[j]), fabsf(v.second[j])));
            is_finite = is_finite && isfinite(v.first[j]) && isfinite(v.second[j]);
        }
        largest = warp_max(largest);
        return __all_sync(ALL_LANES, is_finite) ? largest : __uint_as_float(0x7fc00000u);
    }

    // Of numbers so small that the quotient overflows, and of what is no number, the codes are zeros.
    DEVICE static Number convert(float x, float largest) {
        const float inverse = Code::MOST / largest;
        return isfinite(inverse) ? Code::of(x * inverse) : Number(0);
    }

    DEVICE static float scale(float largest) {
        const bool is_small = largest == largest && !isfinite(Code::MOST / largest);
        return is_small ? 0.0f : largest / Code::MOST;
    }
};

struct Int8Code {
    using Number = int8_t;
    static constexpr float MOST = 127.0f;
    DEVICE static int8_t of(float x) { return float_to_int8(x); }
};

struct E4m3Code {
    using Number = uint8_t;
    static constexpr float MOST = 448.0f;
    DEVICE static uint8_t of(float x) { return float_to_e4m3(x); }
};

// Token blockIdx.x, KV head blockIdx.y. kv_layer is one layer of the cache: [num_blocks][num_kv_heads] of what KvLayout
// says of one head of a block. Weights are null where there is no norm. A slot of UINT32_MAX is none; any other that is
// not below num_slots is a fault.
template <class As>
DEVICE void rope_kv_write(float* qkv, const float* cos_sin, const float* q_weight, const float* k_weight, float eps,
                          const uint32_t* slot_mapping, uint32_t num_slots, void* kv_layer, uint32_t num_heads,
                          uint32_t num_kv_heads, uint32_t head_dim, uint32_t block_size, uint32_t* fault_slot_mapping) {
    using Number = typename As::Number;
    const uint32_t token = blockIdx.x, kv_head = blockIdx.y, half = head_dim / 2;
    const uint32_t slot = slot_mapping[token];
    const bool has_slot = slot != 0xffffffffu;
    if (has_slot && slot >= num_slots) {
        if (threadIdx.x == 0 && kv_head == 0) report_fault(fault_slot_mapping, slot, num_slots);
        return;
    }
    float* row = qkv + size_t(token) * (num_heads + 2 * num_kv_heads) * head_dim;
    const float* turns = cos_sin + size_t(token) * head_dim;
    const uint32_t group_len = num_heads / num_kv_heads;

    // The queries of the group, then the key, then the value.
    for (uint32_t item = warp_index(); item < group_len + 2; item += blockDim.x / 32) {
        if (item < group_len) {
            float* query = row + (kv_head * group_len + item) * head_dim;
            Vector v = load_vector(query, half);
            if (q_weight != nullptr) normalize(v, q_weight, eps, half);
            rotate(v, turns, half);
            UNROLL
            for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
                const uint32_t i = lane_index() + 32 * j;
                if (i >= half) continue;
                query[i] = v.first[j];
                query[i + half] = v.second[j];
            }
            continue;
        }
        if (!has_slot) continue;
        const bool is_key = item == group_len;
        Vector v = load_vector(row + (num_heads + (is_key ? 0 : num_kv_heads) + kv_head) * head_dim, half);
        if (is_key) {
            if (k_weight != nullptr) normalize(v, k_weight, eps, half);
            rotate(v, turns, half);
        }
        const uint32_t block = slot / block_size, offset = slot % block_size, part_len = block_size * head_dim;
        const size_t head_bytes =
            2 * size_t(part_len) * sizeof(Number) + (As::HAS_SCALES ? 2 * block_size * sizeof(float) : 0);
        auto* head = static_cast<unsigned char*>(kv_layer) + (size_t(block) * num_kv_heads + kv_head) * head_bytes;
        auto* numbers = reinterpret_cast<Number*>(head) + (is_key ? 0 : part_len);
        // Of a key, pairs of dimensions are interleaved; of values, pairs of tokens.
        constexpr uint32_t pack = As::INTERLEAVED;
        const auto at = [=](uint32_t dim) {
            return is_key ? (dim / pack * block_size + offset) * pack + dim % pack
                          : (offset / pack * head_dim + dim) * pack + offset % pack;
        };
        const float prepared = As::prepare(v);
        UNROLL
        for (uint32_t j = 0; j < MAX_PER_LANE; j++) {
            const uint32_t i = lane_index() + 32 * j;
            if (i >= half) continue;
            numbers[at(i)] = As::convert(v.first[j], prepared);
            numbers[at(i + half)] = As::convert(v.second[j], prepared);
        }
        if constexpr (As::HAS_SCALES) {
            auto* scales = reinterpret_cast<float*>(head + 2 * size_t(part_len)) + (is_key ? 0 : block_size);
            if (lane_index() == 0) scales[offset] = As::scale(prepared);
        }
    }
}

#define ROPE_KV_WRITE(name, As)                                                                                         \
    KERNEL(name, (128), float* qkv, const float* cos_sin, const float* q_weight, const float* k_weight, float eps,      \
           const uint32_t* slot_mapping, uint32_t num_slots, void* kv_layer, uint32_t num_heads, uint32_t num_kv_heads, \
           uint32_t head_dim, uint32_t block_size, uint32_t* fault_slot_mapping) {                                      \
        rope_kv_write<As>(qkv, cos_sin, q_weight, k_weight, eps, slot_mapping, num_slots, kv_layer, num_heads,          \
                          num_kv_heads, head_dim, block_size, fault_slot_mapping);                                      \
    }

ROPE_KV_WRITE(rope_kv_write_f32, AsF32)
ROPE_KV_WRITE(rope_kv_write_bf16, AsBf16)
ROPE_KV_WRITE(rope_kv_write_i8, AsCodes<Int8Code>)
ROPE_KV_WRITE(rope_kv_write_fp8, AsCodes<E4m3Code>)
