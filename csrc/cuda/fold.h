// The fold kernels of the CUDA backend; the contract stands in mopo_kernels/backends/fold.py. Addresses are of the
// current device; calls return once the work is on the stream. Arithmetic is float32 (float64 for float64 tiles).
#pragma once

#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {

// Working memory of fold_statistics, in doubles: 0 where there are rows enough for a block each.
int64_t statistics_scratch(int64_t rows, int64_t columns, DType dtype);

void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, double* scratch,
                     cudaStream_t stream);

// out = coefficient * (onehot(target) - exp(z - lse)) * dz/dlogit; `out` may be the tile itself. Rows of coefficient 0
// become 0 and are not read.
void fold_gradient(const Tile& tile, const Transform& transform, const double* lse, const double* coefficient,
                   void* out, int64_t out_row_stride, cudaStream_t stream);

// peak[i, j] = max of exp(z - lse) over block i, j of `block` x `block` elements; row-major, [ceil(rows / block)].
void fold_peaks(const Tile& tile, const Transform& transform, const double* lse, int64_t block, double* peak,
                cudaStream_t stream);

}  // namespace mopo
