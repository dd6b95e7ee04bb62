// The affine coupling, forwards and backwards, each in one pass over memory.
//
// ../affine_native.py is what calls it; ../affine_coupling.py does the same with torch's operations. The mapped
// half and its gradients are planes [N, pixels]; parameters and theirs are channels last, [pixels, 2N]: raw, then shift.

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
        const V e = Power(twice > 60.0f ? V{} + 60.0f : twice).minus_1(), inverse = 1 / (e + 2);
        t = e * inverse;
        slope = (1 + t) * (2 * inverse);
    }
};

// Parameters of up to kLanes pixels, or their gradients: channels last in memory, a vector per channel here.
struct Parameters {
    V raw[N], shift[N];

    void read(const float* from, int64_t count) {
        if (count == kLanes) return gather(from, kLanes);  // a constant, so that the loop is unrolled
        __builtin_memset(this, 0, sizeof *this);
        gather(from, count);
    }

    void write(float* to, int64_t count) const {
        if (count == kLanes) return scatter(to, kLanes);
        scatter(to, count);
    }

  private:
    void gather(const float* from, int64_t count) {
        float* to = (float*)this;
        for (int64_t lane = 0; lane < count; ++lane)
            for (int c = 0; c < 2 * N; ++c) to[c * kLanes + lane] = from[lane * 2 * N + c];
    }

    void scatter(float* to, int64_t count) const {
        const float* from = (const float*)this;
        for (int64_t lane = 0; lane < count; ++lane)
            for (int c = 0; c < 2 * N; ++c) to[lane * 2 * N + c] = from[c * kLanes + lane];
    }
};

}  // namespace

// x2, y2: [N, batch, pixels]; params: [batch, pixels, 2N]; logdet: [batch].
extern "C" void glem_affine(const float* x2, const float* params, float* y2, float* logdet, int64_t batch, int64_t pixels,
                            float bound, int32_t inverse, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < batch; ++image) {
        V total = V{};
        for (int64_t p = 0; p < pixels; p += kLanes) {
            const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
            Parameters own;
            own.read(params + at * 2 * N, count);
            for (int64_t c = 0; c < N; ++c) {
                // Lanes without a pixel have raw = 0, so that they add nothing.
                const V s = Bounded(own.raw[c], bound).t * bound, x = load(x2 + c * batch * pixels + at, count);
                const V y = inverse ? (x - own.shift[c]) * exponential(-s) : x * exponential(s) + own.shift[c];
                store(y2 + c * batch * pixels + at, count, y);
                total += s;
            }
        }
        logdet[image] = inverse ? -sum(total) : sum(total);
    }
}

// From the gradients of y2 and logdet to those of x2 and params.
extern "C" void glem_affine_backward(const float* g, const float* g_logdet, const float* x2, const float* params,
                                     float* g_x2, float* g_params, int64_t batch, int64_t pixels, float bound,
                                     int32_t inverse, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < batch; ++image) {
        for (int64_t p = 0; p < pixels; p += kLanes) {
            const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
            Parameters own, grad;
            own.read(params + at * 2 * N, count);
            for (int64_t c = 0; c < N; ++c) {
                const Bounded scale(own.raw[c], bound);
                const V s = scale.t * bound, x = load(x2 + c * batch * pixels + at, count);
                const V g_y = load(g + c * batch * pixels + at, count), g_x = g_y * exponential(inverse ? -s : s);
                const V moved = inverse ? own.shift[c] - x : x;
                const V g_s = g_x * moved + (inverse ? -g_logdet[image] : g_logdet[image]);
                store(g_x2 + c * batch * pixels + at, count, g_x);
                grad.raw[c] = g_s * scale.slope;
                grad.shift[c] = inverse ? -g_x : g_y;
            }
            grad.write(g_params + at * 2 * N, count);
        }
    }
}
