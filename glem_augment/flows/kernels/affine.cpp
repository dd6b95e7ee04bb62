// The affine coupling, forwards and backwards, each in one pass over memory.
//
// ../affine_native.py is what calls it; ../affine_coupling.py does the same with torch's operations. The mapped
// half and its gradients are planes [N, pixels]; parameters and theirs are channels last, [pixels, 2N]: raw, then shift.

#include "affine.h"

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
                V s;
                const V y = own.couple(c, load(x2 + c * batch * pixels + at, count), bound, inverse, &s);
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
        const float g_total = inverse ? -g_logdet[image] : g_logdet[image];
        for (int64_t p = 0; p < pixels; p += kLanes) {
            const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
            Parameters own, grad;
            own.read(params + at * 2 * N, count);
            for (int64_t c = 0; c < N; ++c) {
                const int64_t plane = c * batch * pixels + at;
                const V x = load(x2 + plane, count), g_y = load(g + plane, count);
                V result;
                store(g_x2 + plane, count, own.backward(c, x, g_y, bound, inverse, g_total, &grad, &result));
            }
            grad.write(g_params + at * 2 * N, count);
        }
    }
}
