// The batch contract of the CUDA backend (mopo_kernels/backends/batch.py), each function one launch.
#pragma once

#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {

// sums[rows] of logp over the positions whose target is not ignore_index, and counts[rows] of those.
void sequence_sums(const Sequences& sequences, int64_t ignore_index, double* sums, int64_t* counts,
                   cudaStream_t stream);

// Working memory of `objective`, in doubles.
int64_t objective_scratch(int64_t responses, int64_t objectives);

// Everything in Values, for responses that `group` assigns to groups by any ids; the batch's groups are filled in here.
void objective(const Batch& batch, const int64_t* group, const Options& options, double* scratch, double* values,
               cudaStream_t stream);

}  // namespace mopo
