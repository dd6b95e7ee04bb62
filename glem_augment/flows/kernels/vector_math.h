// Sixteen pixels at a time: what the kernels share.

#pragma once

#include <cstdint>

namespace {

#ifndef LANES
#define LANES 16
#endif
constexpr int kLanes = LANES;
typedef float V __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t I __attribute__((vector_size(4 * kLanes), may_alias));

inline V absolute(V x) { return (V)((I)x & 0x7fffffff); }
inline V sign(V x) { return __builtin_convertvector((I)(x < 0) - (I)(x > 0), V); }

// `count` <= kLanes neighbours in memory; the other lanes are 0, or left out.
inline V load(const float* from, int64_t count) {
    V x = V{};
    if (count == kLanes)
        __builtin_memcpy(&x, from, sizeof(V));
    else
        for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
    return x;
}

inline void store(float* to, int64_t count, V x) {
    if (count == kLanes)
        __builtin_memcpy(to, &x, sizeof(V));
    else
        for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
}

// e^x to two roundings: x = k ln 2 + r, e^r by its series, 2^k by the exponent's bits. NaN stays NaN.
inline V exponential(V of) {
    V x = of;
    x = x > 88.0f ? V{} + 88.0f : x;
    x = x < -87.0f ? V{} - 87.0f : x;
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the last bits.
    const V shifted = x * 1.44269504f + 12582912.0f, k = shifted - 12582912.0f;
    const V r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
    V series = r * (1.0f / 5040) + 1.0f / 720;
    series = series * r + 1.0f / 120;
    series = series * r + 1.0f / 24;
    series = series * r + 1.0f / 6;
    series = series * r + 0.5f;
    series = series * r + 1;
    series = series * r + 1;
    const V power = (V)((I)series + (((I)shifted - 0x4b400000) << 23));
    return of == of ? power : of;
}

// Of numbers per pixel.
inline void sum_images(const float* values, float* sums, int64_t batch, int64_t pixels_per_image) {
    for (int64_t image = 0; image < batch; ++image) {
        double sum = 0;
        for (int64_t p = 0; p < pixels_per_image; ++p) sum += values[image * pixels_per_image + p];
        sums[image] = (float)sum;
    }
}

}  // namespace
