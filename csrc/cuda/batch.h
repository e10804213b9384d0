// The batch contract of the CUDA backend (mopo_kernels/backends/batch.py), each function one launch.
#pragma once

#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {

// sums[rows] of logp over the positions whose target is not ignore_index, and counts[rows] of those.
void sequence_sums(const Sequences& sequences, double* sums, int64_t* counts, cudaStream_t stream);

// Working memory of label_statistics, in doubles.
int64_t labels_scratch(const Labels& labels);

// slot[responses] and the values of Results, for labels whose groups are not sorted yet.
void label_statistics(const Labels& labels, int64_t* slot, double* values, double* scratch, cudaStream_t stream);

}  // namespace mopo
