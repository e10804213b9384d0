// The fold kernels of the CPU backend: everything between the matrix products, on one tile of logits.
//
// Arithmetic is float32 (float64 for float64 tiles), running sums float64. The contract stands in
// mopo_kernels/backends/fold.py. Row kernels (rows.h) are compiled once per instruction set; fold.cpp picks one at run
// time and runs it over rows with OpenMP.
#pragma once

#include <cstdint>

#include "../contract.h"

namespace mopo {

enum class Isa { portable, avx2, avx512 };

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

// Floor: each logit read once.
void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, int threads);

// out = (coefficient * (onehot(target) - p) + lse_coefficient * p) * dz/dlogit with p = exp(z - lse); `out` may be the
// tile itself. Rows whose coefficients are 0 become 0 whatever they hold. Floor: each logit read
// once, each gradient written once.
void fold_gradient(const Tile& tile, const Transform& transform, const GradientRows& gradient, int threads);

// Appends the entries of q * dz/dlogit, where q is p = exp(z - lse) rounded at random, tile by tile in the order of the
// columns. Floor: each logit read once.
void fold_sample(const Tile& tile, const Transform& transform, const Sampling& sampling, const Samples& samples,
                 int threads);

// out[r] = sum of values[r, j] * weight[columns[r, j]]: what a sampled matrix times the weight is, in the dtype of the
// weight or of the values. Floor: a row of weight read for each entry.
void sample_hidden(const Samples& samples, const Matrix& weight, const Matrix& out, int threads);

// out[v] = sum of values[r, j] * hidden[r] over the entries of column v, in the order of the rows: its transpose times
// hidden. Floor: a row of hidden read for each entry, each element of out written once.
void sample_weight(const Samples& samples, const Matrix& hidden, const Matrix& out, int threads);

// e^x elementwise as the kernels compute it, for the accuracy tests.
void vector_exp(const float* x, float* y, int64_t size);
void vector_tanh(const float* x, float* y, int64_t size);

// The instruction set in use: the best the CPU has, or what choose_isa asked for.
Isa current_isa();
bool isa_supported(Isa isa);
void choose_isa(Isa isa);

// What the gradient of one row is made of.
struct RowGradient {
    double lse, coefficient, lse_coefficient;
    int64_t target;  // may lie outside
    void* out;
};

// What one row is sampled with, and where its entries go.
struct RowSampling {
    double lse, floor;
    double* running;
    int64_t target, first_column;  // target: of the tile, may lie outside
    int32_t* columns;
    void* values;
    int32_t* count;
    int64_t capacity;
};

// A weighted sum of rows of a matrix.
struct RowSum {
    const Matrix* matrix;
    const int32_t* rows;  // [count]
    const void* values;  // [count]
    int64_t count;
    void* total;  // [columns] scratch in the dtype of the values, or null: `out` has that dtype, and is summed in place
    void* out;
};

// Row kernels of one instruction set, by tile dtype (indexed by DType).
struct RowKernels {
    // Without the weighted sum, and with it.
    void (*statistics[2][4])(const void* row, int64_t columns, const void* bias, const Transform& transform,
                             const Statistics& of_row);
    void (*gradient[4])(const void* row, int64_t columns, const void* bias, const Transform& transform,
                        const RowGradient& gradient);
    void (*sample[4])(const void* row, int64_t columns, const void* bias, const Transform& transform,
                      const RowSampling& sampling);
    void (*sum[4])(const RowSum& sum);
    double (*value[4])(const void* logit, const void* bias, const Transform& transform);  // z of one logit
    void (*exp)(const float* x, float* y, int64_t size);
    void (*tanh)(const float* x, float* y, int64_t size);
};

const RowKernels& current_kernels();  // of the instruction set in use

extern const RowKernels portable_kernels;
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;

}  // namespace mopo
