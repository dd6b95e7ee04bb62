// ActNorm per channel and 1x1 mixing of the steps of a level, folded into a matrix and a shift each; and the gradients.
//
// ../fold_native.py is what calls it; ../prepared.py does the same with torch's operations. A step's weights are bias [c],
// log_scale [c] and generator [c, c]; they lie apart from each other, as parameters do.

#include "generators.h"

// matrix = exp(generator) diag(exp(log_scale)); shift = matrix bias; logdet: [batch], of all steps
// together, the same for every image.
// norm_pixels, pixels: how often an entry of log_scale counts in it, and one of the generators' diagonals.
extern "C" void glem_fold(const float* const* biases, const float* const* log_scales, const float* const* generators,
                          float* matrices, float* shifts, float* logdet, int64_t steps, int64_t c, int64_t batch,
                          double norm_pixels, double pixels, int32_t threads) {
    double total = 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t step = 0; step < steps; ++step) {
        Dual<double> x(c, false);
        x.clear();
        const float *a = generators[step], *bias = biases[step], *log_scale = log_scales[step];
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j) x.value.at(i, j) = a[i * c + j];
        const Dual<double> made = exponential(x);
        std::vector<double> scales(c);
        for (int64_t j = 0; j < c; ++j) scales[j] = std::exp((double)log_scale[j]);
        float *matrix = matrices + step * c * c, *shift = shifts + step * c;
        for (int64_t i = 0; i < c; ++i) {
            double sum = 0;
            for (int64_t j = 0; j < c; ++j) {
                const double entry = made.value.at(i, j) * scales[j];
                matrix[i * c + j] = (float)entry;
                sum += entry * bias[j];
            }
            shift[i] = (float)sum;
        }
    }
    for (int64_t step = 0; step < steps; ++step)
        for (int64_t i = 0; i < c; ++i)
            total += norm_pixels * log_scales[step][i] + pixels * generators[step][i * c + i];
    for (int64_t image = 0; image < batch; ++image) logdet[image] = (float)total;
}

// From the gradients of what glem_fold makes (matrices: what it made) to those of its weights: [steps, c], [steps, c] and
// [steps, c, c].
extern "C" void glem_fold_backward(const float* const* g_matrices, const float* const* g_shifts, const float* g_logdet,
                                   const float* const* biases, const float* const* log_scales,
                                   const float* const* generators, const float* matrices, float* g_biases,
                                   float* g_log_scales, float* g_generators, int64_t steps, int64_t c, int64_t batch,
                                   double norm_pixels, double pixels, int32_t threads) {
    double g_total = 0;
    for (int64_t image = 0; image < batch; ++image) g_total += g_logdet[image];
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t step = 0; step < steps; ++step) {
        Dual<float> x(c, true);
        x.clear();
        const float *a = generators[step], *g = g_matrices[step], *g_shift = g_shifts[step];
        const float* matrix = matrices + step * c * c;
        for (int64_t j = 0; j < c; ++j) {
            const float scale = std::exp(log_scales[step][j]), bias = biases[step][j];
            double g_bias = 0, g_log_scale = norm_pixels * g_total;
            for (int64_t i = 0; i < c; ++i) {
                const float upstream = g[i * c + j] + g_shift[i] * bias;
                g_bias += matrix[i * c + j] * g_shift[i];
                g_log_scale += upstream * matrix[i * c + j];
                // The adjoint of the derivative at a is the derivative at its transpose.
                x.value.at(j, i) = a[i * c + j];
                x.change.at(i, j) = upstream * scale;
            }
            g_biases[step * c + j] = (float)g_bias;
            g_log_scales[step * c + j] = (float)g_log_scale;
        }
        const Dual<float> made = exponential(x);
        for (int64_t i = 0; i < c; ++i)
            for (int64_t j = 0; j < c; ++j)
                g_generators[(step * c + i) * c + j] = made.change.at(i, j) + (i == j ? (float)(pixels * g_total) : 0);
    }
}
