// What lies between the networks of two affine steps, forwards and backwards, each in one pass over memory: the coupling of
// the first, and the ActNorm and mixing of the second, which are one matrix and one shift. Before the first network there is
// no coupling, and after the last no mixing.
//
// ../affine_joint_native.py is what calls it; ../affine_joint.py does the same with torch's operations. What the couplings
// are of are planes [2N, batch, pixels], wherever they lie (``Planes``); of these the network sees the first N, channels
// last: [batch, pixels, N].

#include "affine.h"

#if N % 2
#error "compile with an even N"
#endif

namespace {

constexpr int C = 2 * N;
// Blocks of pixels between which the sums of their products stay in registers.
constexpr int kBlocks = 16;
constexpr int kTile = 4;

// Where planes lie. With `side` > 1 they are a squeeze of larger images, whose pixels lie row by row: of every block of
// side x side pixels each is a channel of its own.
struct Planes {
    float* first;
    int64_t channel, image;  // from one of the (larger) images' to the next
    int64_t side, width;     // of the planes' rows
};

// The planes of up to kLanes pixels of an image.
class Block {
  public:
    Block(const Planes& planes, int64_t image, int64_t p, int64_t count)
        : planes_(planes), count_(count), first_(planes.first + image * planes.image) {
        if (planes.side == 1) {
            first_ += p;
            return;
        }
        const int32_t step = (int32_t)planes.side, width = (int32_t)planes.width, row = step * step * width;
        int32_t column = (int32_t)p % width, begin = (int32_t)p / width * row;
        for (int lane = 0; lane < kLanes; ++lane) {
            at_[lane] = begin + column * step;
            if (++column == width) column = 0, begin += row;
        }
    }

    void read(V* to) const {
        if (planes_.side > 1) return gather(to);
        const float* from = first_;
        const int64_t step = planes_.channel;
        if (count_ == kLanes)
            for (int c = 0; c < C; ++c, from += step) to[c] = load(from, kLanes);
        else
            for (int c = 0; c < C; ++c, from += step) to[c] = load(from, count_);
    }

    void write(const V* from) const {
        if (planes_.side > 1) return scatter(from);
        float* to = first_;
        const int64_t step = planes_.channel;
        if (count_ == kLanes)
            for (int c = 0; c < C; ++c, to += step) store(to, kLanes, from[c]);
        else
            for (int c = 0; c < C; ++c, to += step) store(to, count_, from[c]);
    }

  private:
    void gather(V* to) const {
        for (int c = 0; c < C; ++c) {
            const float* from = first_ + offset(c);
            to[c] = V{};
            if (count_ == kLanes)
                for (int lane = 0; lane < kLanes; ++lane) to[c][lane] = from[at_[lane]];
            else
                for (int64_t lane = 0; lane < count_; ++lane) to[c][lane] = from[at_[lane]];
        }
    }

    void scatter(const V* from) const {
        for (int c = 0; c < C; ++c) {
            float* to = first_ + offset(c);
            for (int64_t lane = 0; lane < count_; ++lane) to[at_[lane]] = from[c][lane];
        }
    }

    int64_t offset(int64_t c) const {
        const int64_t side = planes_.side, within = c % (side * side);
        return c / (side * side) * planes_.channel + within / side * side * planes_.width + within % side;
    }

    const Planes& planes_;
    int64_t count_;
    float* first_;
    int32_t at_[kLanes];
};

// out = m v + shift, or out = m^T v; several sums at a time, so that none waits for the other and v is read less often.
template <bool transposed>
inline void multiply(const float* m, const float* shift, const V* v, V* out) {
    for (int i = 0; i < C; i += kTile) {
        V sums[kTile];
        for (int a = 0; a < kTile; ++a) sums[a] = transposed ? V{} : V{} + shift[i + a];
        for (int j = 0; j < C; ++j)
            for (int a = 0; a < kTile; ++a) sums[a] += m[transposed ? j * C + i + a : (i + a) * C + j] * v[j];
        for (int a = 0; a < kTile; ++a) out[i + a] = sums[a];
    }
}

// m += above below^T, summed over `count` blocks; with `fresh` m was nothing yet. With `out`, that takes what is left of
// it, the sums of the lanes. Both spare passes over m, which is large where there are many channels.
inline void add_products(const V (*above)[C], const V (*below)[C], int count, V (*m)[C], bool fresh, float* out) {
    for (int i = 0; i < C; i += kTile)
        for (int j = 0; j < C; j += kTile) {
            V sums[kTile][kTile];
            for (int a = 0; a < kTile; ++a)
                for (int b = 0; b < kTile; ++b) sums[a][b] = fresh ? V{} : m[i + a][j + b];
            for (int block = 0; block < count; ++block)
                for (int a = 0; a < kTile; ++a)
                    for (int b = 0; b < kTile; ++b) sums[a][b] += above[block][i + a] * below[block][j + b];
            for (int a = 0; a < kTile; ++a)
                for (int b = 0; b < kTile; ++b)
                    if (out)
                        out[(i + a) * C + j + b] = sum_of_pairs(sums[a][b]);
                    else
                        m[i + a][j + b] = sums[a][b];
        }
}

}  // namespace

// y = x after a coupling by `params` [batch, pixels, 2N], unless these are null, and `matrix` [2N, 2N] with `shift` [2N], unless
// these are. images: [batch, pixels, N], the first half of y, unless null; then y may be null. logdet: [batch], to which that of
// the coupling is added.
extern "C" void glem_affine_joint(const Planes* x, const Planes* y, const float* params, const float* matrix, const float* shift,
                                float* images, float* logdet, int64_t batch, int64_t pixels, float bound, int32_t inverse,
                                int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < batch; ++image) {
        V total = V{};
        for (int64_t p = 0; p < pixels; p += kLanes) {
            const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
            V v[C], out[C];
            Block(*x, image, p, count).read(v);
            if (params) {
                Parameters own;
                own.read(params + at * 2 * N, count);
                for (int c = 0; c < N; ++c) {
                    V s;
                    v[N + c] = own.couple(c, v[N + c], bound, inverse, &s);
                    total += s;
                }
            }
            if (matrix)
                multiply<false>(matrix, shift, v, out);
            else
                __builtin_memcpy(out, v, sizeof v);
            if (y) Block(*y, image, p, count).write(out);
            if (!images) continue;
            PerPixel<N> seen;
            __builtin_memcpy(seen.v, out, sizeof seen.v);
            seen.write(images + at * N, count);
        }
        if (params) logdet[image] += inverse ? -sum(total) : sum(total);
    }
}

// From the gradients g of y, g_images and g_logdet to those of x, params, matrix and shift, but for those that are null.
// Without a coupling, without mixing and without images, theirs are null, too. g_bias: the sums of g_params by channel, [2N],
// unless null. `parts`: [ceil(batch / each), C * C + 2 C], for sums that do not depend on the number of threads.
extern "C" void glem_affine_joint_backward(const Planes* x, const Planes* g, const Planes* g_x, const float* params,
                                         const float* matrix, const float* g_images, const float* g_logdet,
                                         float* g_params, float* g_bias, float* g_matrix, float* g_shift, float* parts,
                                         int64_t batch, int64_t pixels, int64_t each, float bound, int32_t inverse,
                                         int32_t threads) {
    const int64_t chunks = (batch + each - 1) / each, size = C * C + 2 * C;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        V above[kBlocks][C], below[kBlocks][C], products[C][C], sums[C], biases[C];
        for (int i = 0; i < C; ++i) sums[i] = biases[i] = V{};
        int filled = 0;
        bool fresh = true;
        const int64_t end = (chunk + 1) * each < batch ? (chunk + 1) * each : batch;
        for (int64_t image = chunk * each; image < end; ++image) {
            const float g_total = !params ? 0 : inverse ? -g_logdet[image] : g_logdet[image];
            for (int64_t p = 0; p < pixels; p += kLanes) {
                const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
                if (filled == kBlocks) {
                    add_products(above, below, filled, products, fresh, nullptr);
                    filled = 0, fresh = false;
                }
                V *up = above[filled], *v = below[filled], g_v[C];
                Block(*g, image, p, count).read(up);
                Block(*x, image, p, count).read(v);
                if (g_images) {
                    PerPixel<N> seen;
                    seen.read(g_images + at * N, count);
                    for (int c = 0; c < N; ++c) up[c] += seen.v[c];
                }
                if (matrix)
                    multiply<true>(matrix, nullptr, up, g_v);
                else
                    __builtin_memcpy(g_v, up, sizeof g_v);
                if (params) {
                    Parameters own, grad;
                    own.read(params + at * 2 * N, count);
                    for (int c = 0; c < N; ++c) {
                        V result;
                        g_v[N + c] = own.backward(c, v[N + c], g_v[N + c], bound, inverse, g_total, &grad, &result);
                        v[N + c] = result;
                    }
                    grad.write(g_params + at * 2 * N, count);
                    if (g_bias) grad.add_to(biases, count);
                }
                if (g_x) Block(*g_x, image, p, count).write(g_v);
                if (!g_matrix) continue;
                for (int c = 0; c < C; ++c) sums[c] += up[c];
                ++filled;
            }
        }
        float* own = parts + chunk * size;
        if (g_bias)
            for (int i = 0; i < C; ++i) own[C * C + C + i] = sum_of_pairs(biases[i]);
        if (!g_matrix) continue;
        add_products(above, below, filled, products, fresh, own);
        for (int i = 0; i < C; ++i) own[C * C + i] = sum_of_pairs(sums[i]);
    }
    const auto add_up = [&](int64_t first, int64_t count, float* to) {
        for (int64_t entry = 0; to && entry < count; ++entry) {
            double total = 0;
            for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts[chunk * size + first + entry];
            to[entry] = (float)total;
        }
    };
    add_up(0, C * C, g_matrix);
    add_up(C * C, C, g_shift);
    add_up(C * C + C, C, g_bias);
}
