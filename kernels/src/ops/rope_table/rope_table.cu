// Cosine and sine of the rotary angles of a step.
//
// A thread has an angle. Angles are f32, as the models' own code has them; cosine and sine are computed in f64 by
// the formulas of cpu.rs, so that they are the same on every device, and rounded once. f64 is slow on many cards, but there are
// few angles, once a step.

#include "platform.cuh"

// Angle minus the nearest multiple of a quarter turn, and that multiple modulo four. Payne and Hanek 1983; see cpu.rs.
DEVICE double reduce_large(float angle, int& quotient) {
    // The first 256 binary digits of 2/pi behind the point, and zeros.
    const unsigned long long digits[6] = {0xa2f9836e4e441529ull, 0xfc2757d1f534ddc0ull, 0xdb6295993c439041ull,
                                          0xfe5163abdebbc561ull, 0, 0};
    const uint32_t bits = __float_as_uint(angle);
    quotient = 0;
    if ((bits & 0x7f800000u) == 0x7f800000u) return __longlong_as_double(0x7ff8000000000000ll);
    const unsigned long long mantissa = (bits & 0x007fffffu) | 0x00800000u;
    const int skipped = static_cast<int>(bits >> 23 & 0xff) - 150 - 2;
    // A window of 128 digits, in two words.
    unsigned long long high, low;
    if (skipped >= 0) {
        const int index = skipped / 64, shift = skipped % 64;
        high = digits[index];
        low = digits[index + 1];
        if (shift != 0) {
            high = high << shift | low >> (64 - shift);
            low = low << shift | digits[index + 2] >> (64 - shift);
        }
    } else {
        high = digits[0] >> -skipped;
        low = digits[1] >> -skipped | digits[0] << (64 + skipped);
    }
    // Turns in units of 2^-126 quarters; what overflows is a multiple of four.
    unsigned long long turns_low = mantissa * low;
    unsigned long long turns_high = mantissa * high + __umul64hi(mantissa, low);
    const unsigned long long nearest = turns_high + (1ull << 61);
    quotient = static_cast<int>(nearest >> 62);
    turns_high -= static_cast<unsigned long long>(quotient) << 62;
    const bool is_negative = turns_high >> 63 != 0;
    if (is_negative) {
        turns_low = ~turns_low + 1;
        turns_high = ~turns_high + (turns_low == 0 ? 1 : 0);
    }
    // The 64 bits from the first one on, the last of them set where bits behind it are: rounded once.
    double r;
    if (turns_high == 0) {
        r = static_cast<double>(turns_low);
    } else {
        const int shift = 64 - __clzll(static_cast<long long>(turns_high));
        const unsigned long long behind = shift == 64 ? turns_low : turns_low & ((1ull << shift) - 1);
        const unsigned long long top = shift == 64 ? turns_high : turns_high << (64 - shift) | turns_low >> shift;
        // 2^shift
        r = static_cast<double>(top | (behind != 0 ? 1 : 0)) *
            __longlong_as_double(static_cast<long long>(1023 + shift) << 52);
    }
    // 2^-126, then a quarter turn.
    r = r * __longlong_as_double((1023ll - 126) << 52) * 1.57079632679489661923;
    if (is_negative) r = -r;
    if (angle < 0.0f) {
        quotient = -quotient;
        r = -r;
    }
    return r;
}

DEVICE float2 cos_sin(float angle) {
    int quotient;
    double r;
    if (fabsf(angle) <= 1e6f) {
        // pi/2 in parts of 33 bits: their products with a quotient below 2^20 are exact.
        const double x = static_cast<double>(angle), nearest = rint(x * 0.63661977236758134308);
        r = x - nearest * 1.5707963267341256 - nearest * 6.077100506303966e-11 - nearest * 2.0222662487959506e-21;
        quotient = static_cast<int>(nearest);
    } else {
        r = reduce_large(angle, quotient);
    }
    const double z = r * r;
    double s = 1.58969099521155e-10;
    s = s * z + -2.5050760253406863e-8;
    s = s * z + 2.7557313707070068e-6;
    s = s * z + -1.984126982985795e-4;
    s = s * z + 8.33333333332249e-3;
    s = s * z + -1.6666666666666632e-1;
    double c = -1.1359647557788195e-11;
    c = c * z + 2.087572321298175e-9;
    c = c * z + -2.7557314351390663e-7;
    c = c * z + 2.480158728947673e-5;
    c = c * z + -1.388888888887411e-3;
    c = c * z + 4.16666666666666e-2;
    const double sine = r + r * z * s, cosine = 1.0 - 0.5 * z + z * z * c;
    const int quarter = quotient & 3;
    const double turned_cosine = quarter == 0 ? cosine : quarter == 1 ? -sine : quarter == 2 ? -cosine : sine;
    const double turned_sine = quarter == 0 ? sine : quarter == 1 ? cosine : quarter == 2 ? -sine : -cosine;
    return make_float2(static_cast<float>(turned_cosine), static_cast<float>(turned_sine));
}

DEVICE void store(float* out, uint32_t i, float angle, float magnitude) {
    const float2 turned = cos_sin(angle);
    out[2 * size_t(i)] = turned.x * magnitude;
    out[2 * size_t(i) + 1] = turned.y * magnitude;
}

// out[i][0..2] = {cos, sin}(positions[i / len] * inverse[i % len]) * magnitude; i = blockIdx.x * blockDim.x + threadIdx.x.
KERNEL(rope_table_fixed, (256), const uint32_t* positions, uint32_t num_tokens, const float* inverse, uint32_t len,
       float magnitude, float* out) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_tokens * len) return;
    store(out, i, static_cast<float>(positions[i / len]) * inverse[i % len], magnitude);
}

// The same with frequencies of a base that grows with the context (RopeFrequencies::inverse), computed in f64.
KERNEL(rope_table_dynamic_ntk, (256), const uint32_t* positions, uint32_t num_tokens, uint32_t head_dim, float base,
       float factor, uint32_t original_len, float magnitude, float* out) {
    const uint32_t len = head_dim / 2;
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= num_tokens * len) return;
    const uint32_t position = positions[i / len];
    const uint32_t seq_len = max(position == 0xffffffffu ? position : position + 1, original_len);
    const double wide = static_cast<double>(factor), dim = static_cast<double>(head_dim);
    const double stretch = wide * static_cast<double>(seq_len) / static_cast<double>(original_len) - (wide - 1.0);
    const double grown = static_cast<double>(base) * pow(stretch, dim / (dim - 2.0));
    // The power is rounded to f32 before it is inverted, as the models' own code does.
    const float power = static_cast<float>(pow(grown, static_cast<double>(2 * (i % len)) / dim));
    store(out, i, static_cast<float>(position) * (1.0f / power), magnitude);
}
