// What the log-densities of diagonal Gaussians are made of, and their gradients, each in one pass over the parameters.
//
// ../../densities_native.py is what calls it; ../../densities.py does the same with torch's operations.

#include <cmath>

#include "lanes.h"

namespace {

constexpr float kLog2E = 1.44269504088896341f;
// Sums of so many vectors are as good in single precision; beyond, they go on in double precision.
constexpr int64_t kVectors = 32;

// Variances from free parameters: a sigmoid(b s) + c, or with a < 0 s, no less than c.
struct Variances {
    float a, b, c;

    // 1 / var of s; slope: d var / ds.
    V inverse(V s, V* slope = nullptr) const {
        if (a < 0) {
            const V low = V{} + c;
            if (slope) *slope = s >= low ? V{} + 1.0f : V{};
            return 1 / (s < low ? low : s);
        }
        // With p = 1 + e^-bs, the variance is (a + c p) / p. Beyond 2^100 nothing is left of a.
        const V p = 1 + Power(s * (-b * kLog2E), 100.0f).value(), q = a + c * p;
        if (slope) {
            const V share = reciprocal(p);
            *slope = share * (1 - share) * (a * b);
        }
        return p * reciprocal(q);
    }

    // So many of 1 / var can be multiplied with a number in [1, 2) before the product is too large or small.
    int64_t factors() const {
        if (a < 0) return 1;
        const float bits = 1 + std::fmax(std::fabs(std::log2(c)), std::fabs(std::log2(a + c)));
        return bits < 62 ? (int64_t)(124 / bits) : 1;
    }
};

// The logarithm of a product of positive numbers: the exponents are added up now and then, and leave a mantissa.
struct LogOfProduct {
    V product = V{} + 1.0f;
    I exponent = I{};

    void times(V x) { product *= x; }

    void normalise() {
        const I bits = (I)product;
        exponent += (bits >> 23) - 127;
        product = (V)((bits & 0x007FFFFF) | 0x3F800000);
    }

    double value() {
        normalise();
        const double whole = sum_of_pairs(__builtin_convertvector(exponent, V));
        return std::log(product_of_pairs(product)) + whole * 0.693147180559945309417;
    }
};

// Of one class in `size` dimensions: 1 / var, mu / var, and returned sum (log var + mu^2 / var). ahead: where the next
// class begins, too far away for the processor to foresee it. factors: as variances says.
double terms(const float* mu, const float* s, float* inverse, float* scaled, int64_t size, int64_t ahead,
             Variances variances, int64_t factors) {
    LogOfProduct precision;
    double total = 0;
    int64_t since = 0;
    for (int64_t from = 0; from < size; from += kVectors * kLanes) {
        const int64_t end = from + kVectors * kLanes < size ? from + kVectors * kLanes : size;
        V squares = V{};
        // A constant where it is called for whole vectors, so that no lane is looked at.
        const auto some = [&](int64_t at, int64_t count) __attribute__((always_inline)) {
            __builtin_prefetch(mu + at + ahead);
            __builtin_prefetch(s + at + ahead);
            const V mean = load(mu + at, count);
            V own = variances.inverse(load(s + at, count));
            for (int64_t lane = count; lane < kLanes; ++lane) own[lane] = 1;
            const V product = mean * own;
            precision.times(own);
            if (++since == factors) precision.normalise(), since = 0;
            squares += mean * product;
            store(inverse + at, count, own);
            store(scaled + at, count, product);
        };
        int64_t at = from;
        for (; at + kLanes <= end; at += kLanes) some(at, kLanes);
        if (at < end) some(at, end - at);
        total += sum_of_pairs(squares);
    }
    return total - precision.value();
}

}  // namespace

// Of `rows` classes in `size` of their dimensions. mu, s: a class is `stride` numbers from the next; inverse, scaled:
// `size` numbers; totals [rows] are added to.
extern "C" void glem_densities(const float* mu, const float* s, float* inverse, float* scaled, double* totals,
                               int64_t rows, int64_t size, int64_t stride, float a, float b, float c, int32_t threads) {
    const Variances variances{a, b, c};
    const int64_t factors = variances.factors();
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row)
        totals[row] += terms(mu + row * stride, s + row * stride, inverse + row * size, scaled + row * size, size,
                             row + 1 < rows ? stride : 0, variances, factors);
}

// From g = sum_b G [rows], C = G^T z and A = G^T z^2 [rows, size], of G the gradient of the log-densities:
// g_mu = (C - g mu) / var and g_s = ((A - 2 mu C + g mu^2) / var - g) / (2 var) dvar/ds, which lie like mu and s. Where A
// is null there is no g_s.
extern "C" void glem_densities_backward(const float* sums, const float* linear, const float* curved, const float* mu,
                                        const float* s, float* g_mu, float* g_s, int64_t rows, int64_t size,
                                        int64_t stride, float a, float b, float c, int32_t threads) {
    const Variances variances{a, b, c};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t ahead = row + 1 < rows ? stride : 0;
        for (int64_t at = 0; at < size; at += kLanes) {
            const int64_t left = size - at, count = left < kLanes ? left : kLanes;
            const int64_t here = row * size + at, there = row * stride + at;
            __builtin_prefetch(mu + there + ahead);
            __builtin_prefetch(s + there + ahead);
            __builtin_prefetch(g_mu + there + ahead, 1);
            if (curved) __builtin_prefetch(g_s + there + ahead, 1);
            V slope;
            const V mean = load(mu + there, count), product = load(linear + here, count);
            const V pull = product - mean * sums[row], inverse = variances.inverse(load(s + there, count), &slope);
            store(g_mu + there, count, pull * inverse);
            if (!curved) continue;
            const V spread = load(curved + here, count) - mean * (product + pull);
            store(g_s + there, count, (spread * inverse - sums[row]) * inverse * slope * 0.5f);
        }
    }
}
