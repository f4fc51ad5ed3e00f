// Powers of two.
#pragma once

#include "platform.cuh"

// By the bits that src/cpu/math.rs gives, so that a sampler sees the same probabilities on every device: 2^x for x up to 127, relative error below 3e-7; exactly 1 at 0, exactly 0 below -150, NaN of NaN.
DEVICE float exp2_exact(float x) {
    // Not the maximum, which would pass over a NaN.
    x = x < -151.0f ? -151.0f : x;
    // A sum with 1.5 * 2^23 leaves the nearest whole number.
    const float n = (x + 12582912.0f) - 12582912.0f;
    const float r = x - n;
    float p = 1.5353362e-4f;
    p = fmaf(p, r, 1.3398874e-3f);
    p = fmaf(p, r, 9.618437e-3f);
    p = fmaf(p, r, 5.5503324e-2f);
    p = fmaf(p, r, 2.4022648e-1f);
    p = fmaf(p, r, 6.931472e-1f);
    p = fmaf(p, r, 1.0f);
    // In two steps, of which the first is exact: the result may be smaller than the smallest full number.
    const int first = static_cast<int>(n) / 2, second = static_cast<int>(n) - first;
    return p * __uint_as_float(static_cast<uint32_t>(first + 127) << 23) *
           __uint_as_float(static_cast<uint32_t>(second + 127) << 23);
}

// By the device's own instruction: relative error below 2^-22, exactly 1 at 0, 0 below -126 and of minus infinity, NaN of NaN.
DEVICE float exp2_approximate(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#endif
}
