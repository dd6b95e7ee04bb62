// Exponentials of square matrices, and their derivatives.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

namespace {

// Rows that are worked on together, in vectors of 64 bytes.
constexpr int64_t kRows = 8;

// A square matrix in an array whose rows and columns are filled up; what is not set is not defined.
template <typename T>
struct Matrix {
    typedef T V __attribute__((vector_size(64), may_alias));
    static constexpr int64_t kLanes = sizeof(V) / sizeof(T);

    int64_t side, stride, size;
    std::unique_ptr<T[]> entries;

    explicit Matrix(int64_t c)
        : side(c),
          stride((c + kLanes - 1) / kLanes * kLanes),
          size((c + kRows - 1) / kRows * kRows * stride),
          entries(new T[size]) {}

    T& at(int64_t i, int64_t j) { return entries[i * stride + j]; }
    T at(int64_t i, int64_t j) const { return entries[i * stride + j]; }
    void clear() { std::fill_n(entries.get(), size, T(0)); }
    void scale(T factor) {
        for (int64_t k = 0; k < size; ++k) entries[k] *= factor;
    }
    // The sum of factors times matrices.
    void set(std::initializer_list<std::pair<T, const Matrix*>> terms) {
        bool first = true;
        for (const auto& [factor, matrix] : terms) {
            const T* others = matrix->entries.get();
            if (first)
                for (int64_t k = 0; k < size; ++k) entries[k] = factor * others[k];
            else
                for (int64_t k = 0; k < size; ++k) entries[k] += factor * others[k];
            first = false;
        }
    }
};

// out = a b, or out += a b
template <bool kAdd, typename T>
void product(const Matrix<T>& a, const Matrix<T>& b, Matrix<T>& out) {
    typedef typename Matrix<T>::V V;
    const int64_t stride = a.stride, side = a.side;
    for (int64_t i = 0; i < side; i += kRows)
        for (int64_t j = 0; j < stride; j += Matrix<T>::kLanes) {
            V sums[kRows] = {};
            if (kAdd)
                for (int64_t r = 0; r < kRows; ++r)
                    __builtin_memcpy(&sums[r], &out.entries[(i + r) * stride + j], sizeof(V));
            for (int64_t k = 0; k < side; ++k) {
                V other;
                __builtin_memcpy(&other, &b.entries[k * stride + j], sizeof(V));
                for (int64_t r = 0; r < kRows; ++r) sums[r] += a.entries[(i + r) * stride + k] * other;
            }
            for (int64_t r = 0; r < kRows; ++r) __builtin_memcpy(&out.entries[(i + r) * stride + j], &sums[r], sizeof(V));
        }
}

// The largest sum of a row's magnitudes.
template <typename T>
double norm_of(const Matrix<T>& x) {
    double norm = 0;
    for (int64_t i = 0; i < x.side; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < x.side; ++j) sum += std::fabs((double)x.at(i, j));
        if (!(sum <= norm)) norm = sum;
    }
    return norm;
}

// So many halvings that the powers of x, from the second on, are at most about those of 1/2; none of what is not finite.
// The norm of the square is often far below the squared norm (Al-Mohy & Higham, SIAM J. Matrix Anal. Appl. 2009).
template <typename T>
int halvings_of(const Matrix<T>& x, const Matrix<T>& square) {
    const double norm = std::max(std::sqrt(norm_of(square)), norm_of(x) / 4);
    if (!(norm > 0) || !std::isfinite(norm)) return 0;
    const int result = (int)std::ceil(std::log2(norm)) + 1;
    return result > 0 ? result : 0;
}

// A matrix and, if it is wanted, its derivative along a direction.
template <typename T>
struct Dual {
    Matrix<T> value, change;

    explicit Dual(int64_t c, bool changes) : value(c), change(changes ? c : 0) {}

    bool changes() const { return change.side > 0; }
    void clear() {
        value.clear();
        change.clear();
    }
    void scale(T factor) {
        value.scale(factor);
        change.scale(factor);
    }
    // a x + b y + c z
    void set(double a, const Dual& x, double b, const Dual& y, double c, const Dual& z) {
        value.set({{(T)a, &x.value}, {(T)b, &y.value}, {(T)c, &z.value}});
        change.set({{(T)a, &x.change}, {(T)b, &y.change}, {(T)c, &z.change}});
    }
    void set(double a, const Dual& x, double b, const Dual& y) {
        value.set({{(T)a, &x.value}, {(T)b, &y.value}});
        change.set({{(T)a, &x.change}, {(T)b, &y.change}});
    }
    void add_identity(double factor) {
        for (int64_t i = 0; i < value.side; ++i) value.at(i, i) += (T)factor;
    }
    // a b
    void set_product(const Dual& a, const Dual& b) {
        product<false>(a.value, b.value, value);
        if (!changes()) return;
        product<false>(a.value, b.change, change);
        product<true>(a.change, b.value, change);
    }
    void add_product(const Dual& a, const Dual& b) {
        product<true>(a.value, b.value, value);
        if (!changes()) return;
        product<true>(a.value, b.change, change);
        product<true>(a.change, b.value, change);
    }
};

// out = the series of exp(x) up to x^8, in two products (Bader, Blanes & Casas, Mathematics 2019): the coefficients are
// such that the powers from x^5 on come out right.
template <typename T>
void short_series(const Dual<T>& x, const Dual<T>& square, Dual<T>& out) {
    const double root = std::sqrt(177.0);
    const int64_t side = x.value.side;
    Dual<T> left(side, x.changes()), right(side, x.changes()), fourth(side, x.changes());
    left.set((1 + root) / 132, x, (1 + root) / 528, square);
    fourth.set_product(square, left);
    left.set(2.0 / 3, square, 1, fourth);
    right.set((11 * root - 11) / 840, x, (11 * root - 99) / 3360, square, (89 - root) / 2240, fourth);
    right.add_identity((29 * root - 271) / 210);
    out.set(1, x, (857 - 58 * root) / 630, square);
    out.add_identity(1);
    out.add_product(left, right);
}

// out = the series up to x^12, in four products, from the same authors. The coefficients, of 1, x, x^2 and x^3, solve
// equations without a solution in closed form; multiplied out they are 1 / k! within 1e-19.
template <typename T>
void long_series(const Dual<T>& x, const Dual<T>& square, Dual<T>& out) {
    const double coefficients[4][4] = {
        {9.0198e-16, 0.46932117595418237389, -0.20099424927047284052, -0.04623946134063071740},
        {5.31597895759871264183, 1.19926790417132231573, 0.01179296240992997031, 0.01108844528519167989},
        {0.18188869982170434744, 0.05502798439925399070, 0.09351590770535414968, 0.00610700528898058230},
        {-2.0861320e-13, -0.13181061013830184015, -0.02027855540589259079, -0.00675951846863086359},
    };
    const int64_t side = x.value.side;
    Dual<T> cube(side, x.changes()), sixth(side, x.changes()), other(side, x.changes());
    cube.set_product(square, x);
    const auto set = [&](Dual<T>& to, int row) {
        const double* c = coefficients[row];
        to.set(c[1], x, c[2], square, c[3], cube);
        to.add_identity(c[0]);
    };
    set(other, 3);
    set(sixth, 2);
    sixth.add_product(other, other);
    set(other, 1);
    other.set(1, other, 1, sixth);
    set(out, 0);
    out.add_product(other, sixth);
}

// exp(x), and its derivative along the change of x if there is one: every product is differentiated along (Al-Mohy &
// Higham, SIAM J. Matrix Anal. Appl. 2009). By the series, as far as T goes, and squaring. x is overwritten.
template <typename T>
Dual<T> exponential(Dual<T>& x) {
    Dual<T> square(x.value.side, x.changes()), value(x.value.side, x.changes());
    square.set_product(x, x);
    const int halvings = halvings_of(x.value, square.value);
    const T shrink = (T)std::ldexp(1.0, -halvings);
    x.scale(shrink);
    square.scale(shrink * shrink);
    if (sizeof(T) == sizeof(float))
        short_series(x, square, value);
    else
        long_series(x, square, value);
    for (int h = 0; h < halvings; ++h) {
        square.set_product(value, value);
        std::swap(square, value);
    }
    return value;
}

}  // namespace
