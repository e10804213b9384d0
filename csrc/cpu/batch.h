// The batch contract of the CPU backend (mopo_kernels/backends/batch.py).
#pragma once

#include <cstdint>

#include "../contract.h"

namespace mopo {

// sums[rows] of logp over the positions whose target is not ignore_index, and counts[rows] of those.
void sequence_sums(const Sequences& sequences, double* sums, int64_t* counts, int threads);

// slot[responses] and the values of Results, for labels whose groups are not sorted yet.
void label_statistics(Labels labels, int64_t* slot, double* values);

}  // namespace mopo
