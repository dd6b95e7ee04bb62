// Sixteen pixels at a time, one per lane: what is computed of them stays in the processor's caches.

#pragma once

#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;

typedef float V __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t I __attribute__((vector_size(4 * kLanes), may_alias));

#ifdef __AVX512F__
inline __mmask16 first_lanes(int64_t count) { return (__mmask16)((1u << count) - 1); }
#endif

// `count` <= kLanes neighbours in memory; the other lanes are 0, or left out.
inline V load(const float* from, int64_t count) {
    V x = V{};
    if (count == kLanes)
        __builtin_memcpy(&x, from, sizeof(V));
    else
#ifdef __AVX512F__
        x = (V)_mm512_maskz_loadu_ps(first_lanes(count), from);
#else
        for (int64_t lane = 0; lane < count; ++lane) x[lane] = from[lane];
#endif
    return x;
}

inline void store(float* to, int64_t count, V x) {
    if (count == kLanes)
        __builtin_memcpy(to, &x, sizeof(V));
    else
#ifdef __AVX512F__
        _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)x);
#else
        for (int64_t lane = 0; lane < count; ++lane) to[lane] = x[lane];
#endif
}

inline float sum(V x) {
    double total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += x[lane];
    return (float)total;
}

// All lanes joined in halves, by something like addition.
template <typename Join>
inline float joined(V x, Join join) {
    typedef float Half __attribute__((vector_size(2 * kLanes)));
    typedef float Quarter __attribute__((vector_size(kLanes)));
    Half halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    const Half half = join(halves[0], halves[1]);
    Quarter quarters[2];
    __builtin_memcpy(quarters, &half, sizeof half);
    const Quarter last = join(quarters[0], quarters[1]);
    return join(join(last[0], last[2]), join(last[1], last[3]));
}

// The sum in halves: a rounding or two more, in a quarter of the time.
inline float sum_of_pairs(V x) {
    return joined(x, [](auto one, auto two) { return one + two; });
}

inline float product_of_pairs(V x) {
    return joined(x, [](auto one, auto two) { return one * two; });
}

// No less than low, no more than high; what is no number stays so. Of each comparison GCC makes two instructions where
// there is one.
inline V within(V x, float low, float high) {
#ifdef __AVX512F__
    return _mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), x));
#else
    x = x < low ? V{} + low : x;
    return x > high ? V{} + high : x;
#endif
}

// 1 / x within a unit in the last place or two, for 2^-125 < x < 2^125.
inline V reciprocal(V x) {
#ifdef __AVX512F__
    // Divisions take as long as ten multiplications here: 14 bits from a table, and one step of Newton's.
    const V about = _mm512_rcp14_ps(x);
    return about + about * (1 - about * x);
#else
    return 1 / x;
#endif
}

// 2^t = power (1 + rest), within 2 units in the last place for -125 <= t <= 126; beyond, as at the end.
struct Power {
    V power, rest;

    // high: at most 126, for callers that want less.
    explicit Power(V t, float high = 126.0f) {
        t = within(t, -125.0f, high);
        // Added to so large a number, only the whole part of what is added is left, in the lowest bits, with what an
        // exponent is stored with: 127.
        const float large = 12582912.0f + 127.0f;
        const V shifted = t + large, r = t - (shifted - large);
        // 2^r - 1 on [-1/2, 1/2]. Polynomial: Cephes (S. Moshier), exp2f.
        V p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
        p = p * r + 9.618437357674640e-3f;
        p = p * r + 5.550332471162809e-2f;
        p = p * r + 2.402264791363012e-1f;
        rest = (p * r + 6.931472028550421e-1f) * r;
        power = (V)((I)shifted << 23);
    }

    V value() const { return power * rest + power; }
    V minus_1() const { return power * rest + (power - 1); }
};

}  // namespace
