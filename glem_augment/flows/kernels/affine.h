// What both kernels of affine couplings do with sixteen pixels of the mapped half: N channels.

#pragma once

#include "lanes.h"

#ifndef N
#error "compile with -DN=<channels of the mapped half>"
#endif

namespace {

constexpr float kLog2E = 1.44269504088896341f;

inline V exponential(V x) { return Power(x * kLog2E).value(); }

// t = tanh(raw / bound) and 1 - t^2, neither as a difference of two numbers that are almost the same.
struct Bounded {
    V t, slope;

    Bounded(V raw, float bound) {
        const V twice = raw * (2 * kLog2E / bound);
        // Far beyond where t rounds to 1, and far from where the power does not fit any more.
        const V e = Power(twice, 60.0f).minus_1(), inverse = reciprocal(e + 2);
        t = e * inverse;
        slope = (1 + t) * (2 * inverse);
    }
};

// M numbers for each of up to kLanes pixels: channels last in memory, a vector per channel here.
template <int M>
struct PerPixel {
    V v[M];

    void read(const float* from, int64_t count) {
        if (count == kLanes) return gather(from, kLanes);  // a constant, so that the loop is unrolled
        __builtin_memset(this, 0, sizeof *this);
        gather(from, count);
    }

    void write(float* to, int64_t count) const {
        if (count == kLanes) return scatter(to, kLanes);
        scatter(to, count);
    }

    // to += v, but for lanes without a pixel
    void add_to(V* to, int64_t count) const {
        if (count == kLanes) {
            for (int c = 0; c < M; ++c) to[c] += v[c];
            return;
        }
        I own;
        for (int lane = 0; lane < kLanes; ++lane) own[lane] = lane < count ? -1 : 0;
        for (int c = 0; c < M; ++c) to[c] += (V)((I)v[c] & own);
    }

  private:
    void gather(const float* from, int64_t count) {
        float* to = (float*)v;
        for (int64_t lane = 0; lane < count; ++lane)
            for (int c = 0; c < M; ++c) to[c * kLanes + lane] = from[lane * M + c];
    }

    void scatter(float* to, int64_t count) const {
        const float* from = (const float*)v;
        for (int64_t lane = 0; lane < count; ++lane)
            for (int c = 0; c < M; ++c) to[lane * M + c] = from[c * kLanes + lane];
    }
};

// What the network makes of the other half: raw log-scales, then shifts.
struct Parameters : PerPixel<2 * N> {
    V raw(int64_t c) const { return v[c]; }
    V shift(int64_t c) const { return v[N + c]; }

    // The coupling of channel c; s: what of log|det| it adds.
    V couple(int64_t c, V x, float bound, bool inverse, V* s) const {
        *s = Bounded(raw(c), bound).t * bound;
        return inverse ? (x - shift(c)) * exponential(-*s) : x * exponential(*s) + shift(c);
    }

    // Its gradients: of x, returned; of the parameters, in `to`. `result`: of the coupling, made again; `g_logdet`: of the
    // sum of s.
    V backward(int64_t c, V x, V g, float bound, bool inverse, float g_logdet, Parameters* to, V* result) const {
        const Bounded scale(raw(c), bound);
        const V s = scale.t * bound, power = exponential(inverse ? -s : s), g_x = g * power;
        const V moved = inverse ? shift(c) - x : x;
        to->v[c] = (g_x * moved + g_logdet) * scale.slope;
        to->v[N + c] = inverse ? -g_x : g;
        *result = inverse ? -moved * power : x * power + shift(c);
        return g_x;
    }
};

}  // namespace
