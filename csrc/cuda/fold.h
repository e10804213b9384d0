// The fold kernels of the CUDA backend; the contract stands in mopo_kernels/backends/fold.py. Addresses are of the
// current device; calls return once the work is on the stream. Arithmetic is float32 (float64 for float64 tiles).
#pragma once

#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {

// Working memory of fold_statistics, in doubles: 0 where there are rows enough for a block each.
int64_t statistics_scratch(const Tile& tile);

// Floor: each logit read once.
void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, double* scratch,
                     cudaStream_t stream);

// out = (coefficient * (onehot(target) - p) + lse_coefficient * p) * dz/dlogit with p = exp(z - lse); `out` may be the
// tile itself. Rows whose coefficients are 0 become 0 and are not read. Floor: each logit read once,
// each gradient written once.
void fold_gradient(const Tile& tile, const Transform& transform, const GradientRows& gradient, cudaStream_t stream);

}  // namespace mopo
