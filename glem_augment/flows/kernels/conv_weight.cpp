// The gradient of a convolution's weight, of few images: as sums over their pixels, written where they belong.
//
// ../conv_weight_native.py is what calls it. torch has it in blocks from oneDNN, and passes over it twice to put it in
// order; with few pixels, that takes a third of the time. Strides and dilations are 1, and images keep their size.

#include <algorithm>

#include "lanes.h"

#ifndef __AVX512F__
#error "this takes more registers than there are"
#endif

namespace {

// A tile of sums, all in registers: so many channels that come out, times so many vectors of those that go in.
constexpr int kOut = OUT;
constexpr int kVectors = 3;

struct Size {
    int64_t batch, height, width, in, out, side;  // side: of the weight

    int64_t pixels() const { return batch * height * width; }
    int64_t vectors() const { return (in + kLanes - 1) / kLanes; }
    int64_t tiles_in() const { return (vectors() + kVectors - 1) / kVectors; }
    int64_t tiles_out() const { return (out + kOut - 1) / kOut; }
    // Tiles of vectors differ by one at most.
    int64_t first_vector(int64_t tile) const { return tile * vectors() / tiles_in(); }
};

// to: [pixels, count], channels [first, first + count) of from [pixels, channels]; those beyond are 0.
void pack(const float* from, int64_t pixels, int64_t channels, int64_t first, int64_t count, float* to) {
    const int64_t there = std::min(count, channels - first);
    for (int64_t p = 0; p < pixels; ++p, to += count) {
        __builtin_memcpy(to, from + p * channels + first, sizeof(float) * there);
        for (int64_t c = there; c < count; ++c) to[c] = 0;
    }
}

// The sums of g [pixels, kOut] times x [pixels, kVecs * kLanes] `dx` pixels to the right and `dy` below. to: their place,
// with `rows` rows, `step` numbers apart, of `count` numbers each.
template <int kVecs>
void products(const float* g, const float* x, const Size& size, int64_t dy, int64_t dx, float* to, int64_t step,
              int64_t rows, int64_t count) {
    const int64_t top = std::max<int64_t>(0, -dy), bottom = std::min(size.height, size.height - dy);
    const int64_t left = std::max<int64_t>(0, -dx), right = std::min(size.width, size.width - dx);
    V own[kOut][kVecs];
    for (int o = 0; o < kOut; ++o)
        for (int v = 0; v < kVecs; ++v) own[o][v] = V{};
    for (int64_t image = 0; image < size.batch && left < right; ++image)
        for (int64_t y = top; y < bottom; ++y) {
            const int64_t at = (image * size.height + y) * size.width + left;
            const float *g_at = g + at * kOut, *x_at = x + (at + dy * size.width + dx) * (kVecs * kLanes);
            for (int64_t left_over = right - left; left_over > 0; --left_over, g_at += kOut, x_at += kVecs * kLanes) {
                V seen[kVecs];
                for (int v = 0; v < kVecs; ++v) seen[v] = load(x_at + v * kLanes, kLanes);
                for (int o = 0; o < kOut; ++o)
                    for (int v = 0; v < kVecs; ++v) own[o][v] += g_at[o] * seen[v];
            }
        }
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t v = 0; v < kVecs; ++v)
            store(to + row * step + v * kLanes, std::min<int64_t>(kLanes, count - v * kLanes), own[row][v]);
}

}  // namespace

// From g [batch, height, width, out], that of the result, and x [batch, height, width, in] to g_weight [out, side, side, in].
// room: [pixels, out and in, filled up to whole tiles].
extern "C" void glem_conv_weight(const float* g, const float* x, float* g_weight, float* room, int64_t batch,
                                 int64_t height, int64_t width, int64_t in, int64_t out, int64_t side,
                                 int32_t threads) {
    const Size size{batch, height, width, in, out, side};
    const int64_t pixels = size.pixels(), tiles_in = size.tiles_in(), tiles_out = size.tiles_out();
    float *packed_g = room, *packed_x = room + tiles_out * kOut * pixels;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t tile = 0; tile < tiles_out + tiles_in; ++tile) {
        if (tile < tiles_out) {
            pack(g, pixels, out, tile * kOut, kOut, packed_g + tile * kOut * pixels);
        } else {
            const int64_t first = kLanes * size.first_vector(tile - tiles_out);
            const int64_t end = kLanes * size.first_vector(tile - tiles_out + 1);
            pack(x, pixels, in, first, end - first, packed_x + first * pixels);
        }
    }
    // Tiles that go in are not all of one size; each thread has some of each.
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t index = 0; index < tiles_out * tiles_in * side * side; ++index) {
        const int64_t tap = index % (side * side), tile = index / (side * side);
        const int64_t o = tile / tiles_in * kOut, begin = size.first_vector(tile % tiles_in);
        const int64_t vectors = size.first_vector(tile % tiles_in + 1) - begin, first = begin * kLanes;
        const auto multiply = vectors == 3 ? products<3> : vectors == 2 ? products<2> : products<1>;
        multiply(packed_g + o * pixels, packed_x + first * pixels, size, tap / side - side / 2, tap % side - side / 2,
                 g_weight + (o * side * side + tap) * in + first, side * side * in, std::min<int64_t>(kOut, out - o),
                 std::min(vectors * kLanes, in - first));
    }
}
