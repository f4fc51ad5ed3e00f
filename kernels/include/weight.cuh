// How packed weights lie in memory: one place for the kernels that multiply them and those that look a number up.
// `ops/linear/cuda/weight.rs` packs them, by the same formulas.
//
// Output features are cut into panels of 128, eight tiles of 16; each panel is a stream of stages over the input features,
// missing features and inputs filled up with zeros. A tile of stacked parts is 16 features in order; of gate and up it is
// gates of 8 outputs, then their ups: a lane of the matrix instructions then holds both halves of an output.
//
// | kind       | input features of a stage | a stage                                                                  |
// |------------|---------------------------|--------------------------------------------------------------------------|
// | bf16       | 64                        | [16 inputs][tile][lane] fragments of m16n8k16                            |
// | int8       | 128                       | [32 inputs][tile][lane] fragments of m16n8k32; scales; minima            |
// | int4       | 128                       | [64 inputs][tile][lane] two fragments of m16n8k32, the first in the low halves of the bytes; scales; minima |
// | fp8        | 128                       | [32 inputs][tile][lane] two fragments of m16n8k16, the first in bytes 1 and 3 of each word, the second in 0 and 2; scales |
// | f32        | 1                         | [64 features]; panels are 64 features, gates in even lanes, ups behind   |
//
// A fragment is 16 bytes of a lane: four words, the second that of the features 8 later, the third and fourth those of the
// second half of the inputs. Scales and minima are f16, of fp8 f32: [group][tile][feature of the first 8][2], the second 8 later.
// Codes are whole numbers around zero, those of 4 bits around 8, or indices into a table.

#pragma once

#include "numbers.cuh"

constexpr uint32_t WEIGHT_IS_GATE_UP = 1;
constexpr uint32_t WEIGHT_HAS_MIN = 2;
constexpr uint32_t WEIGHT_HAS_TABLE = 4;
// The kind is what the bits from here on say.
constexpr uint32_t WEIGHT_KIND_SHIFT = 4;
constexpr uint32_t WEIGHT_BF16 = 0;
constexpr uint32_t WEIGHT_F32 = 1;
constexpr uint32_t WEIGHT_INT8_LONG = 2;
constexpr uint32_t WEIGHT_INT8_SHORT = 3;
constexpr uint32_t WEIGHT_INT4 = 4;
constexpr uint32_t WEIGHT_FP8 = 5;

constexpr int PANEL_FEATURES = 128;
constexpr int TILES_OF_PANEL = PANEL_FEATURES / 16;
constexpr int F32_PANEL_FEATURES = 64;
constexpr int BF16_STAGE_FEATURES = 64;
constexpr int INT8_STAGE_FEATURES = 128;
// Codes of 8 bits, or numbers; those of 4 bits take half of it.
constexpr int STAGE_BYTES = 16384;
constexpr int FP8_STAGE_FEATURES = 128;
// With its scales.
constexpr int FP8_STAGE_BYTES = STAGE_BYTES + PANEL_FEATURES * 4;

constexpr uint32_t NO_FEATURE = 0xffffffffu;

// The output feature at `place` of a tile, both counted over the whole weight.
DEVICE uint32_t weight_feature(uint32_t out_features, uint32_t is_gate_up, uint32_t tile, uint32_t place) {
    if (is_gate_up) {
        const uint32_t num_outputs = out_features / 2;
        const uint32_t output = tile * 8 + place % 8;
        return output < num_outputs ? place / 8 * num_outputs + output : NO_FEATURE;
    }
    const uint32_t feature = tile * 16 + place;
    return feature < out_features ? feature : NO_FEATURE;
}

// As above, of a lane of a panel of f32.
DEVICE uint32_t weight_feature_f32(uint32_t out_features, uint32_t is_gate_up, uint32_t panel, uint32_t lane) {
    if (is_gate_up) {
        const uint32_t num_outputs = out_features / 2;
        const uint32_t output = panel * (F32_PANEL_FEATURES / 2) + lane / 2;
        return output < num_outputs ? lane % 2 * num_outputs + output : NO_FEATURE;
    }
    const uint32_t feature = panel * F32_PANEL_FEATURES + lane;
    return feature < out_features ? feature : NO_FEATURE;
}

// Two numbers of f16, low half first.
DEVICE float2 half_pair(uint32_t bits) {
    float2 pair;
    pair.x = half_to_float(bits & 0xffffu);
    pair.y = half_to_float(bits >> 16);
    return pair;
}

// Four codes of 4 bits, one in each byte, to whole numbers around zero: `code - 8`, without a borrow between bytes.
DEVICE uint32_t int4_values(uint32_t codes) {
    return ((codes | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

// Four indices, one in each byte, to what ggml's table of IQ4_NL has there.
DEVICE uint32_t iq4_nl_values(uint32_t indices) {
    const uint32_t pairs = indices | (indices >> 4);
    const uint32_t selector = ((pairs & 0xffu) | ((pairs >> 8) & 0xff00u)) & 0x7777u;
    // -127, -104, -83, -65, -49, -35, -22, -10, then 1, 13, 25, 38, 53, 69, 89, 113.
    const uint32_t low = __byte_perm(0xbfad9881u, 0xf6eaddcfu, selector);
    const uint32_t high = __byte_perm(0x26190d01u, 0x71594535u, selector);
    const uint32_t is_high = ((indices >> 3) & 0x01010101u) * 0xffu;
    return (low & ~is_high) | (high & is_high);
}

// One number of a packed weight.
DEVICE float weight_value(const uint8_t* weights, uint32_t flags, uint32_t out_features, uint32_t in_features,
                                     uint32_t feature, uint32_t input) {
    const uint32_t kind = flags >> WEIGHT_KIND_SHIFT;
    const uint32_t num_outputs = out_features / 2;
    const bool is_gate_up = (flags & WEIGHT_IS_GATE_UP) != 0;
    const uint32_t output = is_gate_up ? feature % num_outputs : feature;
    const uint32_t part = is_gate_up ? feature / num_outputs : 0;
    if (kind == WEIGHT_F32) {
        const uint32_t half = F32_PANEL_FEATURES / 2;
        const uint32_t panel = is_gate_up ? output / half : output / F32_PANEL_FEATURES;
        const uint32_t lane = is_gate_up ? output % half * 2 + part : output % F32_PANEL_FEATURES;
        const float* numbers = reinterpret_cast<const float*>(weights);
        return numbers[(size_t(panel) * in_features + input) * F32_PANEL_FEATURES + lane];
    }
    const uint32_t tile = is_gate_up ? output / 8 : output / 16;
    const uint32_t place = is_gate_up ? part * 8 + output % 8 : output % 16;
    const uint32_t panel = tile / TILES_OF_PANEL;
    if (kind == WEIGHT_BF16) {
        const uint32_t num_stages = (in_features + BF16_STAGE_FEATURES - 1) / BF16_STAGE_FEATURES;
        const size_t step = (size_t(panel) * num_stages + input / BF16_STAGE_FEATURES) * (BF16_STAGE_FEATURES / 16) +
                            input % BF16_STAGE_FEATURES / 16;
        const uint32_t lane = place % 8 * 4 + input % 8 / 2;
        const uint32_t word = input % 16 / 8 * 2 + place / 8;
        const size_t at = ((step * TILES_OF_PANEL + tile % TILES_OF_PANEL) * 32 + lane) * 16 + word * 4 + input % 2 * 2;
        return __uint_as_float(uint32_t(*reinterpret_cast<const uint16_t*>(weights + at)) << 16);
    }
    if (kind == WEIGHT_FP8) {
        const uint32_t num_stages = (in_features + FP8_STAGE_FEATURES - 1) / FP8_STAGE_FEATURES;
        const uint8_t* stage = weights + (size_t(panel) * num_stages + input / FP8_STAGE_FEATURES) * FP8_STAGE_BYTES;
        const uint32_t step = input % FP8_STAGE_FEATURES / 32;
        const uint32_t lane = place % 8 * 4 + input % 8 / 2;
        const uint32_t word = input % 16 / 8 * 2 + place / 8;
        const uint32_t byte = input % 2 * 2 + 1 - input % 32 / 16;
        const uint8_t code = stage[((step * TILES_OF_PANEL + tile % TILES_OF_PANEL) * 32 + lane) * 16 + word * 4 + byte];
        const float* scales = reinterpret_cast<const float*>(stage + STAGE_BYTES);
        return scales[(tile % TILES_OF_PANEL * 8 + place % 8) * 2 + place / 8] * e4m3_to_float(code);
    }
    const uint32_t num_stages = (in_features + INT8_STAGE_FEATURES - 1) / INT8_STAGE_FEATURES;
    const uint32_t num_groups = kind == WEIGHT_INT8_LONG ? 1 : 4;
    const uint32_t code_bytes = kind == WEIGHT_INT4 ? STAGE_BYTES / 2 : STAGE_BYTES;
    const uint32_t scale_bytes = num_groups * PANEL_FEATURES * 2;
    const uint32_t stage_bytes = code_bytes + ((flags & WEIGHT_HAS_MIN) ? 2 : 1) * scale_bytes;
    const uint8_t* stage = weights + (size_t(panel) * num_stages + input / INT8_STAGE_FEATURES) * stage_bytes;
    const uint32_t step = input % INT8_STAGE_FEATURES / 32;
    const uint32_t lane = place % 8 * 4 + input % 16 / 4;
    const uint32_t word = input % 32 / 16 * 2 + place / 8;
    const uint32_t row = kind == WEIGHT_INT4 ? step / 2 : step;
    const uint8_t byte = stage[((row * TILES_OF_PANEL + tile % TILES_OF_PANEL) * 32 + lane) * 16 + word * 4 + input % 4];
    int32_t code = int32_t(int8_t(byte));
    if (kind == WEIGHT_INT4) {
        const uint32_t half = uint32_t(byte) >> (step % 2 * 4) & 15u;
        code = int32_t(int8_t((flags & WEIGHT_HAS_TABLE) ? iq4_nl_values(half) : int4_values(half)));
    }
    const uint32_t group = num_groups == 1 ? 0 : step;
    const uint32_t at = code_bytes + ((group * TILES_OF_PANEL + tile % TILES_OF_PANEL) * 8 + place % 8) * 4;
    const float2 scale = half_pair(*reinterpret_cast<const uint32_t*>(stage + at));
    const float value = (place < 8 ? scale.x : scale.y) * float(code);
    if (!(flags & WEIGHT_HAS_MIN)) {
        return value;
    }
    const float2 min = half_pair(*reinterpret_cast<const uint32_t*>(stage + at + scale_bytes));
    return value + (place < 8 ? min.x : min.y);
}
