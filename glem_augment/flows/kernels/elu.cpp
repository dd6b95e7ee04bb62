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

namespace {

// g_x = g elu'(x) + added, of y = elu(x), for `count` <= kLanes numbers.
template <bool kAdded>
inline V backward(const float* g, const float* y, const float* added, float* g_x, int64_t count) {
    const V v = load(y, count), own = load(g, count) * (v > 0 ? V{} + 1.0f : v + 1.0f);
    const V result = kAdded ? own + load(added, count) : own;
    store(g_x, count, result);
    return result;
}

template <bool kAdded>
void backward_of_all(const float* g, const float* y, const float* added, float* g_x, int64_t size, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t at = 0; at < size; at += kLanes) {
        const int64_t left = size - at, count = left < kLanes ? left : kLanes;
        backward<kAdded>(g + at, y + at, kAdded ? added + at : nullptr, g_x + at, count);
    }
}

// That for pixels [begin, end), and the sums of g_x by channel, [channels]. These stay in the nearest cache, while the rest
// is read in the order in which it lies.
template <bool kAdded>
void backward_with_sums(const float* g, const float* y, const float* added, float* g_x, float* sums, int64_t begin,
                        int64_t end, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
    for (int64_t first = begin * channels; first < end * channels; first += channels)
        for (int64_t c = 0; c < channels; c += kLanes) {
            const int64_t left = channels - c, count = left < kLanes ? left : kLanes, at = first + c;
            const V result = backward<kAdded>(g + at, y + at, kAdded ? added + at : nullptr, g_x + at, count);
            store(sums + c, count, load(sums + c, count) + result);
        }
}

}  // namespace

// g_x = g elu'(x) + added, of y = elu(x), for `size` numbers; added may be null, and g_x may be g or added.
extern "C" void glem_elu_backward(const float* g, const float* y, const float* added, float* g_x, int64_t size,
                                  int32_t threads) {
    (added ? backward_of_all<true> : backward_of_all<false>)(g, y, added, g_x, size, threads);
}

// That for [pixels, channels], with the sums of g_x by channel. parts: [ceil(pixels / each), channels], for sums that do
// not depend on the number of threads.
extern "C" void glem_elu_backward_sums(const float* g, const float* y, const float* added, float* g_x, float* sums,
                                       float* parts, int64_t pixels, int64_t channels, int64_t each, int32_t threads) {
    const int64_t chunks = (pixels + each - 1) / each;
    const auto run = added ? backward_with_sums<true> : backward_with_sums<false>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * each, end = begin + each < pixels ? begin + each : pixels;
        run(g, y, added, g_x, parts + chunk * channels, begin, end, channels);
    }
    for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts[chunk * channels + c];
        sums[c] = (float)total;
    }
}
