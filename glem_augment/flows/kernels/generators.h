// Exponentials of square matrices, and their derivatives.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace {

// Rows that are worked on together, in vectors of 64 bytes.
constexpr int64_t kRows = 8;

// A square matrix in an array whose rows and columns are filled up with zeros.
template <typename T>
struct Matrix {
    typedef T V __attribute__((vector_size(64), may_alias));
    static constexpr int64_t kLanes = sizeof(V) / sizeof(T);

    int64_t side, rows, stride;
    std::vector<T> entries;

    explicit Matrix(int64_t c)
        : side(c),
          rows((c + kRows - 1) / kRows * kRows),
          stride((c + kLanes - 1) / kLanes * kLanes),
          entries(rows * stride) {}

    T& at(int64_t i, int64_t j) { return entries[i * stride + j]; }
    T at(int64_t i, int64_t j) const { return entries[i * stride + j]; }
    void scale(T factor) {
        for (T& entry : entries) entry *= factor;
    }
    void clear() { std::fill(entries.begin(), entries.end(), T(0)); }
};

// out += a b
template <typename T>
void add_product(const Matrix<T>& a, const Matrix<T>& b, Matrix<T>& out) {
    typedef typename Matrix<T>::V V;
    const int64_t stride = a.stride, side = a.side;
    for (int64_t i = 0; i < side; i += kRows)
        for (int64_t j = 0; j < stride; j += Matrix<T>::kLanes) {
            V sums[kRows];
            for (int64_t r = 0; r < kRows; ++r) __builtin_memcpy(&sums[r], &out.entries[(i + r) * stride + j], sizeof(V));
            for (int64_t k = 0; k < side; ++k) {
                V other;
                __builtin_memcpy(&other, &b.entries[k * stride + j], sizeof(V));
                for (int64_t r = 0; r < kRows; ++r) sums[r] += a.entries[(i + r) * stride + k] * other;
            }
            for (int64_t r = 0; r < kRows; ++r) __builtin_memcpy(&out.entries[(i + r) * stride + j], &sums[r], sizeof(V));
        }
}

// So many halvings that no row sums to more than 1/2; none of what is not finite.
template <typename T>
int halvings_of(const Matrix<T>& x) {
    double norm = 0;
    for (int64_t i = 0; i < x.side; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < x.side; ++j) sum += std::fabs((double)x.at(i, j));
        if (!(sum <= norm)) norm = sum;
    }
    if (!(norm > 0) || !std::isfinite(norm)) return 0;
    const int result = (int)std::ceil(std::log2(norm)) + 1;
    return result > 0 ? result : 0;
}

// out += factor x
template <typename T>
void add_scaled(const Matrix<T>& x, T factor, Matrix<T>& out) {
    for (size_t k = 0; k < x.entries.size(); ++k) out.entries[k] += factor * x.entries[k];
}

// exp(x) by its series and squaring, and its derivative along `d` if there is one: every product is differentiated along.
// The series up to x^terms by Paterson & Stockmeyer (SIAM J. Comput. 1973): a polynomial in x^3 whose coefficients are
// polynomials in x, which takes less than half of the products. `change` is of no use without d.
template <typename T>
void exponential(Matrix<T>& x, Matrix<T>* d, int terms, Matrix<T>& value, Matrix<T>& change) {
    const int halvings = halvings_of(x);
    const T shrink = (T)std::ldexp(1.0, -halvings);
    const int64_t side = x.side, changed = d ? side : 0;
    Matrix<T> next(side), square(side), cube(side), next_change(changed), square_change(changed), cube_change(changed);
    // out = a b, and what becomes of its derivative
    const auto multiply = [d](const Matrix<T>& a, const Matrix<T>& a_change, const Matrix<T>& b,
                              const Matrix<T>& b_change, Matrix<T>& out, Matrix<T>& out_change) {
        out.clear();
        add_product(a, b, out);
        if (!d) return;
        out_change.clear();
        add_product(a, b_change, out_change);
        add_product(a_change, b, out_change);
    };
    const auto multiply_value_by = [&](const Matrix<T>& with, const Matrix<T>& with_change) {
        multiply(value, change, with, with_change, next, next_change);
        std::swap(value.entries, next.entries);
        if (d) std::swap(change.entries, next_change.entries);
    };
    x.scale(shrink);
    if (d) d->scale(shrink);
    const Matrix<T>& x_change = d ? *d : next_change;
    multiply(x, x_change, x, x_change, square, square_change);
    multiply(square, square_change, x, x_change, cube, cube_change);
    const Matrix<T>*powers[] = {&x, &square}, *changes[] = {&x_change, &square_change};
    for (int first = terms / 3 * 3; first >= 0; first -= 3) {
        if (first + 3 <= terms) multiply_value_by(cube, cube_change);
        double factor = 1;
        for (int k = 2; k <= first; ++k) factor /= k;
        for (int64_t i = 0; i < side; ++i) value.at(i, i) += (T)factor;
        for (int k = 1; k < 3 && first + k <= terms; ++k) {
            factor /= first + k;
            add_scaled(*powers[k - 1], (T)factor, value);
            if (d) add_scaled(*changes[k - 1], (T)factor, change);
        }
    }
    for (int h = 0; h < halvings; ++h) multiply_value_by(value, change);
}

}  // namespace
