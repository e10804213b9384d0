// The batch contract of the CPU backend (mopo_kernels/backends/batch.py): sums over ragged rows, and the objective.
#pragma once

#include <cstdint>

#include "../contract.h"

namespace mopo {

// sums[rows] of logp over the positions whose target is not ignore_index, and counts[rows] of those.
void sequence_sums(const Sequences& sequences, int64_t ignore_index, double* sums, int64_t* counts, int threads);

// Everything in Values, for responses that `group` assigns to groups by any ids; the batch's groups are filled in here.
void objective(Batch batch, const int64_t* group, const Options& options, double* values);

}  // namespace mopo
