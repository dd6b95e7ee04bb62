// Exponentials of small square matrices, and the adjoint of their derivative.
//
// ../generators.py is what calls it, and does the same with torch's operations. Matrices are [count, c, c], row by row.

#include "generators.h"

// exp(sign * A), taken in float64.
extern "C" void glem_exp(const float* a, float* out, int64_t count, int64_t c, float sign, int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t m = 0; m < count; ++m) {
        Dual<double> x(c, false);
        x.clear();
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j) x.value.at(i, j) = (double)sign * a[(m * c + i) * c + j];
        const Dual<double> made = exponential(x);
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j) out[(m * c + i) * c + j] = (float)made.value.at(i, j);
    }
}

// From the gradient g of exp(sign * A) to A's: the derivative at the transpose, along g.
extern "C" void glem_exp_backward(const float* a, const float* g, float* out, int64_t count, int64_t c, float sign,
                                  int32_t threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t m = 0; m < count; ++m) {
        Dual<float> x(c, true);
        x.clear();
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j) {
                x.value.at(i, j) = sign * a[(m * c + j) * c + i];
                x.change.at(i, j) = g[(m * c + i) * c + j];
            }
        const Dual<float> made = exponential(x);
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j) out[(m * c + i) * c + j] = sign * made.change.at(i, j);
    }
}
