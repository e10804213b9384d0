// What the kernels of every device take: the arguments of mopo_kernels/backends/fold.py and batch.py with addresses.
#pragma once

#include <cstdint>

#include "labels.h"

namespace mopo {

enum class DType { float32, bfloat16, float16, float64 };

inline int64_t element_size(DType dtype) {
    switch (dtype) {
        case DType::float32: return 4;
        case DType::float64: return 8;
        default: return 2;
    }
}

//     z = outer * tanh(inner * (logit + bias))    with softcap c:  inner = logit_scale / c, outer = c / temperature
//     z = inner * (logit + bias)                  without:         inner = logit_scale / temperature
//
// A softcap bounds what is finite: -inf masks a token, and +inf and NaN must show.
struct Transform {
    double inner;
    double outer;
    bool softcap;
};

// Columns first_column .. first_column + columns - 1 of rows of logits, row-major.
struct Tile {
    void* data;
    DType dtype;
    int64_t rows;
    int64_t columns;
    int64_t row_stride;  // elements from row to row
    int64_t first_column;
    const void* bias;  // [columns] float32 (float64 for float64 tiles), or null
    const int64_t* target;  // [rows] column of each row's target in the whole vocabulary; negative: skip the row
};

// Running statistics of each row, float64: start at -inf, 0, -inf, 0 and fold tiles in any order.
struct Statistics {
    double* maximum;  // [rows] of z
    double* total;  // [rows] sum of exp(z - maximum)
    double* chosen;  // [rows] z of the target
    double* weighted;  // [rows] sum of exp(z - maximum) * (z - maximum), or null: nobody asks for the entropy
};

// What a tile's gradient is made of, and where it goes: rows of `out` are `row_stride` elements apart.
struct GradientRows {
    const double* lse;  // [rows]
    const double* coefficient;  // [rows] of logp
    const double* lse_coefficient;  // [rows], or null: 0
    void* out;
    int64_t row_stride;
};

// Entries of sampled rows, `capacity` places for each row.
struct Samples {
    int32_t* columns;  // [rows, capacity] of the whole vocabulary
    void* values;  // [rows, capacity]
    DType dtype;  // of the values: float32, or float64 for float64 tiles
    int32_t* counts;  // [rows] entries of a row, at its first places
    int64_t rows;
    int64_t capacity;
};

// What a tile is sampled with. p >= floor stays exact; the others are rounded to 0 or to the floor.
struct Sampling {
    const double* lse;  // [rows]
    double* running;  // [rows] sum over the columns before this tile's, on the grid
    double floor;
};

// (t + GRID) - GRID in double rounds t <= 1 to a multiple of 2^-40, to the nearest even.
constexpr double GRID = 6144;

// Rows of a matrix, any stride apart, the elements of one side by side.
struct Matrix {
    void* data;
    DType dtype;
    int64_t rows, columns, row_stride;
};

// Log-probabilities and targets of sequences; rows lie any stride apart, the elements of one side by side.
struct Sequences {
    int64_t rows, columns;
    Floats logp;
    int64_t logp_row_stride;
    const int64_t* target;
    int64_t target_row_stride;
    int64_t ignore_index;
};

}  // namespace mopo
