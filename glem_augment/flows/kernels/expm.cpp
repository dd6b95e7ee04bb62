// The matrix-exponential coupling for N x N matrices, forwards and backwards, each in one pass over memory.
//
// ../expm_native.py is what calls it; ../expm_coupling.py does the same with torch's operations, and says what that is.
// Vectors and their gradients are planes [N, pixels]; parameters and theirs are channels last, [pixels, N * N + N].

#include "lanes.h"

#ifndef N
#error "compile with -DN=<rows of the matrices>"
#endif

namespace {

constexpr int kChannels = N * N + N;
// As in ../expm_native.py.
constexpr int kMaxTerms = 16, kMaxSegments = 8, kPlans = 11;

inline V absolute(V x) { return (V)((I)x & 0x7fffffff); }
inline V sign(V x) { return __builtin_convertvector((I)(x < 0) - (I)(x > 0), V); }

// Of numbers per pixel.
inline void sum_images(const float* values, float* sums, int64_t batch, int64_t pixels_per_image) {
    for (int64_t image = 0; image < batch; ++image, values += pixels_per_image) {
        V parts = V{};
        for (int64_t p = 0; p < pixels_per_image; p += kLanes) {
            const int64_t left = pixels_per_image - p;
            parts += load(values + p, left < kLanes ? left : kLanes);
        }
        sums[image] = sum(parts);
    }
}

struct Matrices {
    V s[N][N], factor[N], shift[N], trace;
    int segments, terms;
};

// The parameters of `count` pixels, channels last, to bounded matrices and shifts.
inline void read(const float* params, int64_t count, float bound, const int32_t* plans, Matrices& m) {
    if (count < kLanes) __builtin_memset(&m, 0, sizeof m);
    for (int64_t lane = 0; lane < count; ++lane) {
        const float* p = params + lane * kChannels;
        float* s = (float*)&m.s[0][0] + lane;
        for (int c = 0; c < N * N; ++c) s[c * kLanes] = p[c];
        float* shift = (float*)&m.shift[0] + lane;
        for (int c = 0; c < N; ++c) shift[c * kLanes] = p[N * N + c];
    }
    V least = V{} + bound;
    m.trace = V{};
    for (int i = 0; i < N; ++i) {
        V sum = V{} + 1;
        for (int j = 0; j < N; ++j) sum += absolute(m.s[i][j]);
        V factor = bound / sum;
        for (int j = 0; j < N; ++j) m.s[i][j] *= factor;
        m.trace += m.s[i][i];
        m.factor[i] = factor;
        least = factor < least ? factor : least;
    }
    float smallest = least[0];
    for (int lane = 1; lane < kLanes; ++lane) smallest = least[lane] < smallest ? least[lane] : smallest;
    // A row sums to bound - factor; small matrices need fewer terms.
    float norm = bound - smallest + 1e-6f * bound, reach = bound;
    int plan = 0;
    while (plan < kPlans - 1 && norm <= reach / 2) reach /= 2, ++plan;
    m.segments = plans[2 * plan];
    m.terms = plans[2 * plan + 1];
}

inline void load_planes(const float* planes, int64_t pixels, int64_t count, V* v) {
    for (int i = 0; i < N; ++i) v[i] = load(planes + i * pixels, count);
}

inline void store_planes(float* planes, int64_t pixels, int64_t count, const V* v) {
    for (int i = 0; i < N; ++i) store(planes + i * pixels, count, v[i]);
}

inline void multiply(const V s[N][N], const V* v, V* out) {
    for (int i = 0; i < N; ++i) {
        V sum = s[i][0] * v[0];
        for (int j = 1; j < N; ++j) sum += s[i][j] * v[j];
        out[i] = sum;
    }
}

inline void multiply_transposed(const V s[N][N], const V* v, V* out) {
    for (int j = 0; j < N; ++j) {
        V sum = s[0][j] * v[0];
        for (int i = 1; i < N; ++i) sum += s[i][j] * v[i];
        out[j] = sum;
    }
}

// v + h S (v + h S / 2 (v + ...)), in place
inline void apply(const V s[N][N], V* v, float h, int terms) {
    V out[N], product[N];
    for (int i = 0; i < N; ++i) out[i] = v[i];
    for (int k = terms; k > 0; --k) {
        multiply(s, out, product);
        for (int i = 0; i < N; ++i) out[i] = v[i] + (h / k) * product[i];
    }
    for (int i = 0; i < N; ++i) v[i] = out[i];
}

}  // namespace

// `trace` is room for a number per pixel. `plans` are pairs of segments and terms for matrices whose norm is at most
// `bound`, half of it, a quarter and so on.
extern "C" void glem_expm(const float* x2, const float* params, float* y2, float* trace, float* logdet,
                          int64_t batch, int64_t pixels_per_image, float bound, int32_t inverse,
                          const int32_t* plans, int32_t threads) {
    const int64_t pixels = batch * pixels_per_image, blocks = (pixels + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kLanes, count = pixels - first < kLanes ? pixels - first : kLanes;
        Matrices m;
        V v[N];
        read(params + first * kChannels, count, bound, plans, m);
        load_planes(x2 + first, pixels, count, v);
        const float h = (inverse ? -1.0f : 1.0f) / m.segments;
        if (inverse)
            for (int i = 0; i < N; ++i) v[i] -= m.shift[i];
        for (int segment = 0; segment < m.segments; ++segment) apply(m.s, v, h, m.terms);
        if (!inverse)
            for (int i = 0; i < N; ++i) v[i] += m.shift[i];
        store_planes(y2 + first, pixels, count, v);
        store(trace + first, count, inverse ? -m.trace : m.trace);
    }
    sum_images(trace, logdet, batch, pixels_per_image);
}

// From gradients of the result and of log|det| to those of x2 and of the parameters.
extern "C" void glem_expm_backward(const float* g, const float* g_logdet, const float* x2, const float* params,
                                   float* g_x2, float* g_params, int64_t batch, int64_t pixels_per_image, float bound,
                                   int32_t inverse, const int32_t* plans, int32_t threads) {
    const int64_t pixels = batch * pixels_per_image, blocks = (pixels + kLanes - 1) / kLanes;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kLanes, count = pixels - first < kLanes ? pixels - first : kLanes;
        Matrices m;
        V starts[kMaxSegments][N], terms[kMaxTerms][N], adjoints[kMaxTerms][N], a[N], grad_shift[N], grad_trace = V{};
        read(params + first * kChannels, count, bound, plans, m);
        load_planes(x2 + first, pixels, count, starts[0]);
        load_planes(g + first, pixels, count, a);
        const float h = (inverse ? -1.0f : 1.0f) / m.segments;
        if (inverse)
            for (int i = 0; i < N; ++i) starts[0][i] -= m.shift[i];
        for (int segment = 1; segment < m.segments; ++segment) {
            for (int i = 0; i < N; ++i) starts[segment][i] = starts[segment - 1][i];
            apply(m.s, starts[segment], h, m.terms);
        }
        for (int i = 0; i < N; ++i) grad_shift[i] = a[i];
        for (int64_t lane = 0; lane < count; ++lane) {
            const float value = g_logdet[(first + lane) / pixels_per_image];
            grad_trace[lane] = inverse ? -value : value;
        }
        V grad[N][N];
        for (int segment = m.segments - 1; segment >= 0; --segment) {
            // t_k = h S t_(k-1) / k, and a_k = g + h S^T a_(k+1) / (k+1); dL/dS = sum_k h a_k t_(k-1)^T / k.
            V* term = terms[0];
            for (int i = 0; i < N; ++i) term[i] = starts[segment][i];
            for (int k = 1; k < m.terms; ++k) {
                multiply(m.s, terms[k - 1], terms[k]);
                for (int i = 0; i < N; ++i) terms[k][i] *= h / k;
            }
            V upstream[N], product[N];
            for (int i = 0; i < N; ++i) upstream[i] = a[i];
            for (int k = m.terms; k > 0; --k) {
                for (int i = 0; i < N; ++i) adjoints[k - 1][i] = a[i] * (h / k);
                multiply_transposed(m.s, adjoints[k - 1], product);
                for (int i = 0; i < N; ++i) a[i] = upstream[i] + product[i];
            }
            const bool last = segment == m.segments - 1;
            for (int i = 0; i < N; ++i)
                for (int j = 0; j < N; ++j) {
                    V sum = last ? V{} : grad[i][j];
                    for (int k = 0; k < m.terms; ++k) sum += adjoints[k][i] * terms[k][j];
                    grad[i][j] = sum;
                }
        }
        store_planes(g_x2 + first, pixels, count, a);
        if (inverse)
            for (int i = 0; i < N; ++i) grad_shift[i] = -a[i];
        // Back through S = bound raw / (1 + sum |raw|), row by row.
        for (int i = 0; i < N; ++i) {
            grad[i][i] += grad_trace;
            V row = V{};
            for (int j = 0; j < N; ++j) row += grad[i][j] * m.s[i][j];
            row *= m.factor[i] * (-1 / bound);
            for (int j = 0; j < N; ++j) grad[i][j] = sign(m.s[i][j]) * row + grad[i][j] * m.factor[i];
        }
        for (int64_t lane = 0; lane < count; ++lane) {
            float* p = g_params + (first + lane) * kChannels;
            const float* values = (const float*)&grad[0][0] + lane;
            for (int c = 0; c < N * N; ++c) p[c] = values[c * kLanes];
            const float* shift = (const float*)&grad_shift[0] + lane;
            for (int c = 0; c < N; ++c) p[N * N + c] = shift[c * kLanes];
        }
    }
}
