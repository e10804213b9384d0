// Sampling and the products of what was sampled, of the CUDA backend; the contract stands in
// mopo_kernels/backends/fold.py. Addresses are of the current device; calls return once the work is on the stream.
#pragma once

#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {

// Weighted sums of rows of a matrix: list i has the entries start[i] .. stop[i] - 1 (mopo_kernels/backends/lists.py).
struct Lists {
    const int64_t* start;
    const int64_t* stop;
    const int32_t* source_row;  // of the matrix, of each entry
    const void* value;  // of each entry, in the matrix's arithmetic
};

// Appends the entries of q * dz/dlogit, where q is p = exp(z - lse) rounded at random, tile by tile in the order of the
// columns. Floor: each logit read once.
void fold_sample(const Tile& tile, const Transform& transform, const Sampling& sampling, const Samples& samples,
                 cudaStream_t stream);

// out[i] = sum of value[e] * matrix[source_row[e]] over list i, in its order. Floor: a row of the matrix read for each entry,
// each element of out written once.
void sum_rows(const Lists& lists, const Matrix& matrix, const Matrix& out, cudaStream_t stream);

}  // namespace mopo
