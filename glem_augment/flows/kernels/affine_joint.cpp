// What lies between the networks of two affine steps, forwards and backwards, each in one pass over memory: the coupling of
// the first, and the ActNorm and mixing of the second, which are one matrix and one shift. Before the first network there is
// no coupling, and after the last no mixing.
//
// ../affine_joint_native.py is what calls it; ../affine_joint.py does the same with torch's operations. Tensors are planes
// [2N, batch, pixels], of which the network sees the first N, channels last: [batch, pixels, N].

#include "affine.h"

#if N % 2
#error "compile with an even N"
#endif

namespace {

constexpr int C = 2 * N;
// Blocks of pixels between which the sums of their products stay in registers.
constexpr int kBlocks = 16;
constexpr int kTile = 4;

// out = m v + shift
inline void multiply(const float* m, const float* shift, const V* v, V* out) {
    for (int i = 0; i < C; ++i) {
        V sum = V{} + shift[i];
        for (int j = 0; j < C; ++j) sum += m[i * C + j] * v[j];
        out[i] = sum;
    }
}

// out = m^T v
inline void multiply_transposed(const float* m, const V* v, V* out) {
    for (int j = 0; j < C; ++j) out[j] = m[j] * v[0];
    for (int i = 1; i < C; ++i)
        for (int j = 0; j < C; ++j) out[j] += m[i * C + j] * v[i];
}

// m += above below^T, summed over `count` blocks
inline void add_products(const V (*above)[C], const V (*below)[C], int count, V (*m)[C]) {
    for (int i = 0; i < C; i += kTile)
        for (int j = 0; j < C; j += kTile) {
            V sums[kTile][kTile];
            for (int a = 0; a < kTile; ++a)
                for (int b = 0; b < kTile; ++b) sums[a][b] = m[i + a][j + b];
            for (int block = 0; block < count; ++block)
                for (int a = 0; a < kTile; ++a)
                    for (int b = 0; b < kTile; ++b) sums[a][b] += above[block][i + a] * below[block][j + b];
            for (int a = 0; a < kTile; ++a)
                for (int b = 0; b < kTile; ++b) m[i + a][j + b] = sums[a][b];
        }
}

}  // namespace

// x, y: planes; params: [batch, pixels, 2N], or null for no coupling; matrix: [2N, 2N], or null for no mixing; shift: [2N];
// images: [batch, pixels, N], the first half of y, unless null; logdet: [batch], of the coupling.
extern "C" void glem_affine_joint(const float* x, const float* params, const float* matrix, const float* shift, float* y,
                                float* images, float* logdet, int64_t batch, int64_t pixels, float bound, int32_t inverse,
                                int32_t threads) {
    const int64_t all = batch * pixels;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t image = 0; image < batch; ++image) {
        V total = V{};
        for (int64_t p = 0; p < pixels; p += kLanes) {
            const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
            V v[C], out[C];
            for (int c = 0; c < C; ++c) v[c] = load(x + c * all + at, count);
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
                multiply(matrix, shift, v, out);
            else
                __builtin_memcpy(out, v, sizeof v);
            for (int c = 0; c < C; ++c) store(y + c * all + at, count, out[c]);
            if (!images) continue;
            PerPixel<N> seen;
            __builtin_memcpy(seen.v, out, sizeof seen.v);
            seen.write(images + at * N, count);
        }
        if (params) logdet[image] = inverse ? -sum(total) : sum(total);
    }
}

// From the gradients of y, images and logdet to those of x, params, matrix and shift, but for those that are null. Without
// a coupling, without mixing and without images, theirs are null, too. `parts`: [ceil(batch / each), C * C + C], for sums
// that do not depend on the number of threads.
extern "C" void glem_affine_joint_backward(const float* g, const float* g_images, const float* g_logdet, const float* x,
                                         const float* params, const float* matrix, float* g_x, float* g_params,
                                         float* g_matrix, float* g_shift, float* parts, int64_t batch, int64_t pixels,
                                         int64_t each, float bound, int32_t inverse, int32_t threads) {
    const int64_t all = batch * pixels, chunks = (batch + each - 1) / each, size = C * C + C;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        V above[kBlocks][C], below[kBlocks][C], products[C][C], sums[C];
        for (int i = 0; i < C; ++i) {
            sums[i] = V{};
            for (int j = 0; j < C; ++j) products[i][j] = V{};
        }
        int filled = 0;
        const int64_t end = (chunk + 1) * each < batch ? (chunk + 1) * each : batch;
        for (int64_t image = chunk * each; image < end; ++image) {
            const float g_total = !params ? 0 : inverse ? -g_logdet[image] : g_logdet[image];
            for (int64_t p = 0; p < pixels; p += kLanes) {
                const int64_t left = pixels - p, count = left < kLanes ? left : kLanes, at = image * pixels + p;
                V *up = above[filled], *v = below[filled], g_v[C];
                for (int c = 0; c < C; ++c) {
                    up[c] = load(g + c * all + at, count);
                    v[c] = load(x + c * all + at, count);
                }
                if (g_images) {
                    PerPixel<N> seen;
                    seen.read(g_images + at * N, count);
                    for (int c = 0; c < N; ++c) up[c] += seen.v[c];
                }
                if (matrix)
                    multiply_transposed(matrix, up, g_v);
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
                }
                if (g_x)
                    for (int c = 0; c < C; ++c) store(g_x + c * all + at, count, g_v[c]);
                if (!g_matrix) continue;
                for (int c = 0; c < C; ++c) sums[c] += up[c];
                if (++filled == kBlocks) {
                    add_products(above, below, filled, products);
                    filled = 0;
                }
            }
        }
        if (!g_matrix) continue;
        add_products(above, below, filled, products);
        float* own = parts + chunk * size;
        for (int i = 0; i < C; ++i) {
            for (int j = 0; j < C; ++j) own[i * C + j] = sum(products[i][j]);
            own[C * C + i] = sum(sums[i]);
        }
    }
    if (!g_matrix) return;
    for (int64_t entry = 0; entry < size; ++entry) {
        double total = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += parts[chunk * size + entry];
        (entry < C * C ? g_matrix[entry] : g_shift[entry - C * C]) = (float)total;
    }
}
