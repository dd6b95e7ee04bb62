// Sixteen pixels at a time, one per lane: what is computed of them stays in the processor's caches.

#pragma once

#include <cstdint>

namespace {

constexpr int kLanes = 16;

typedef float V __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t I __attribute__((vector_size(4 * kLanes), may_alias));

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

inline float sum(V x) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
    return (float)total;
}

}  // namespace
