// The fold kernels of the CPU backend: everything between the matrix products, on one tile of logits.
//
//     z = outer * tanh(inner * (logit + bias))    with softcap c:  inner = logit_scale / c, outer = c / temperature
//     z = inner * (logit + bias)                  without:         inner = logit_scale / temperature
//
// A tile is rows x columns, row-major with `row_stride` elements between rows, and holds columns first_column ..
// first_column + columns - 1 of the logits. Arithmetic is float32 (float64 for float64 tiles), running sums float64.
// The contract stands in mopo_kernels/backends/fold.py. Row kernels (rows.h) are compiled once per instruction set;
// fold.cpp picks one at run time and runs it over rows with OpenMP.
#pragma once

#include <cstdint>

namespace mopo {

enum class DType { float32, bfloat16, float16, float64 };
enum class Isa { portable, avx2, avx512 };

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

struct Transform {
    double inner;
    double outer;
    bool softcap;
};

struct Tile {
    void* data;
    DType dtype;
    int64_t rows;
    int64_t columns;
    int64_t row_stride;
    int64_t first_column;
    const void* bias;  // [columns] float32 (float64 for float64 tiles), or null
    const int64_t* target;  // [rows] column of each row's target in the whole vocabulary; negative: skip the row
};

// Running statistics of each row, float64: start at -inf, 0, -inf and fold tiles in any order.
struct Statistics {
    double* max;  // [rows]
    double* sum;  // [rows] sum of exp(z - max)
    double* target;  // [rows] z at the target
};

void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, int threads);

// out = coefficient * (onehot(target) - exp(z - lse)) * dz/dlogit; `out` may be the tile itself. Rows of coefficient 0
// become 0 whatever they hold.
void fold_gradient(const Tile& tile, const Transform& transform, const double* lse, const double* coefficient,
                   void* out, int64_t out_row_stride, int threads);

// peak[i, j] = max of exp(z - lse) over block i, j of `block` x `block` elements; row-major, [ceil(rows / block)].
void fold_peaks(const Tile& tile, const Transform& transform, const double* lse, int64_t block, double* peak,
                int threads);

// e^x elementwise as the kernels compute it, for the accuracy tests.
void vector_exp(const float* x, float* y, int64_t size);
void vector_tanh(const float* x, float* y, int64_t size);

// The instruction set in use: the best the CPU has, or what choose_isa asked for.
Isa current_isa();
bool isa_supported(Isa isa);
void choose_isa(Isa isa);

// Row kernels of one instruction set, by tile dtype (indexed by DType).
struct RowKernels {
    void (*statistics[4])(const void* row, int64_t columns, const void* bias, const Transform& transform, double* max,
                          double* sum);
    void (*gradient[4])(const void* row, int64_t columns, const void* bias, const Transform& transform, double lse,
                        double coefficient, int64_t target, void* out);
    double (*max[4])(const void* row, int64_t columns, const void* bias, const Transform& transform);
    void (*exp)(const float* x, float* y, int64_t size);
    void (*tanh)(const float* x, float* y, int64_t size);
};

extern const RowKernels portable_kernels;
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;

}  // namespace mopo
