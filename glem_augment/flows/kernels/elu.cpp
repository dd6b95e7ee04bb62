// ELU and its gradient, each in one pass over memory.
//
// ../elu_native.py is what calls it; fast_elu in ../activations.py does the same with torch's operations.

#include "lanes.h"

// y = x where x > 0, elsewhere outside (2^(inside x) - 1), for `size` numbers; y may be x.
extern "C" void glem_elu(const float* x, float* y, int64_t size, float inside, float outside, int32_t threads) {
    const int64_t whole = size / kLanes * kLanes;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < whole; at += kLanes) {
        const V v = load(x + at, kLanes);
        store(y + at, kLanes, v > 0 ? v : Power(v * inside).minus_1() * outside);
    }
    if (whole < size) {
        const V v = load(x + whole, size - whole);
        store(y + whole, size - whole, v > 0 ? v : Power(v * inside).minus_1() * outside);
    }
}

// g_x = g elu'(x) + added, of y = elu(x), for `size` numbers; added may be null, and g_x may be g or added.
extern "C" void glem_elu_backward(const float* g, const float* y, const float* added, float* g_x, int64_t size,
                                  int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < size; at += kLanes) {
        const int64_t left = size - at, count = left < kLanes ? left : kLanes;
        const V v = load(y + at, count), own = load(g + at, count) * (v > 0 ? V{} + 1.0f : v + 1.0f);
        store(g_x + at, count, added ? own + load(added + at, count) : own);
    }
}
