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

// That for pixels [begin, end) and kVectors vectors of channels, and their sums.
template <bool kAdded, int kVectors>
void backward_with_sums(const float* g, const float* y, const float* added, float* g_x, float* sums, int64_t begin,
                        int64_t end, int64_t channels) {
    V totals[kVectors];
    for (V& total : totals) total = V{};
    for (int64_t first = begin * channels; first < end * channels; first += channels)
        for (int v = 0; v < kVectors; ++v) {
            const int64_t at = first + v * kLanes;
            totals[v] += backward<kAdded>(g + at, y + at, kAdded ? added + at : nullptr, g_x + at, kLanes);
        }
    for (int v = 0; v < kVectors; ++v) store(sums + v * kLanes, kLanes, totals[v]);
}

// So many vectors at once: what is read of a pixel lies side by side, and the sums are in registers.
constexpr int64_t kMost = 4;

template <bool kAdded>
void backward_of_chunk(const float* g, const float* y, const float* added, float* g_x, float* sums, int64_t begin,
                       int64_t end, int64_t channels) {
    for (int64_t c = 0; c < channels; c += kMost * kLanes) {
        const int64_t left = (channels - c) / kLanes;
        const auto run = left >= kMost ? backward_with_sums<kAdded, kMost>
                         : left == 3   ? backward_with_sums<kAdded, 3>
                         : left == 2   ? backward_with_sums<kAdded, 2>
                                       : backward_with_sums<kAdded, 1>;
        run(g + c, y + c, kAdded ? added + c : nullptr, g_x + c, sums + c, begin, end, channels);
    }
}

}  // namespace

// g_x = g elu'(x) + added, of y = elu(x), for `size` numbers; added may be null, and g_x may be g or added.
extern "C" void glem_elu_backward(const float* g, const float* y, const float* added, float* g_x, int64_t size,
                                  int32_t threads) {
    (added ? backward_of_all<true> : backward_of_all<false>)(g, y, added, g_x, size, threads);
}

// That for [pixels, channels], with the sums of g_x by channel, of which there are whole vectors. parts:
// [ceil(pixels / each), channels], for sums that do not depend on the number of threads.
extern "C" void glem_elu_backward_sums(const float* g, const float* y, const float* added, float* g_x, float* sums,
                                       float* parts, int64_t pixels, int64_t channels, int64_t each, int32_t threads) {
    const int64_t chunks = (pixels + each - 1) / each;
    const auto run = added ? backward_of_chunk<true> : backward_of_chunk<false>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t begin = chunk * each, end = begin + each < pixels ? begin + each : pixels;
        run(g, y, added, g_x, parts + chunk * channels, begin, end, channels);
    }
    for (int64_t c = 0; c < channels; c += kLanes) {
        double totals[kLanes] = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
            for (int64_t lane = 0; lane < kLanes; ++lane) totals[lane] += parts[chunk * channels + c + lane];
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[c + lane] = (float)totals[lane];
    }
}
