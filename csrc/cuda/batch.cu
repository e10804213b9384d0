// Sums over ragged rows by a block per row, and the objective by one block, whose warps take the objectives in turn.
#include "batch.h"

#include "launch.cuh"
#include "team.cuh"

namespace mopo {
namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    sequence_sums_kernel(Sequences sequences, int64_t ignore_index, double* sums, int64_t* counts) {
    const int64_t row = blockIdx.x, first = row * sequences.logp_row_stride;
    const int64_t* target = sequences.target + row * sequences.target_row_stride;
    const Team<THREADS> team;
    double totals[2];
    team.sum(sequences.columns, totals, [&](int64_t i, double* total) {
        if (target[i] == ignore_index) return;
        total[0] += sequences.logp[first + i];
        total[1] += 1;
    });
    team.once([&] {
        sums[row] = totals[0];
        counts[row] = static_cast<int64_t>(totals[1]);
    });
}

// Working memory: what all objectives read, two columns of each objective's own, and the sorted groups.
struct ObjectiveMemory {
    static constexpr int64_t SHARED = 3, OWN = 2;
    double* doubles;
    int64_t responses, objectives;

    __device__ Scratch scratch(int64_t objective) const {
        double* own = doubles + (SHARED + OWN * objective) * responses;
        return {doubles, doubles + responses, doubles + 2 * responses, own, own + responses};
    }
    __device__ int64_t* integers() const {
        return reinterpret_cast<int64_t*>(doubles + (SHARED + OWN * objectives) * responses);
    }
};

__global__ void __launch_bounds__(THREADS, 1)  // one block in all: registers are free, spills are not
    objective_kernel(Batch batch, const int64_t* group, Options options, ObjectiveMemory memory, double* values) {
    int64_t *first = memory.integers(), *order = first + batch.responses, *start = order + batch.responses;
    const Values out = Values::of(values, batch.responses, batch.objectives);
    const Team<THREADS> block;
    batch.groups = sort_by_scanning(block, group, batch.responses, first, order, start);
    batch.order = order;
    batch.start = start;
    weighted_loss(block, batch, options, memory.scratch(0), out);
    const Team<WARP> warp;
    for (int64_t k = threadIdx.x / WARP; k < batch.objectives; k += block.WARPS)
        estimate(warp, batch, options, k, memory.scratch(k), out);
}

}  // namespace

void sequence_sums(const Sequences& sequences, int64_t ignore_index, double* sums, int64_t* counts,
                   cudaStream_t stream) {
    if (sequences.rows == 0) return;
    launch(sequence_sums_kernel, sequences.rows, THREADS, stream, sequences, ignore_index, sums, counts);
}

int64_t objective_scratch(int64_t responses, int64_t objectives) {
    const int64_t doubles = ObjectiveMemory::SHARED + ObjectiveMemory::OWN * objectives, integers = 3;
    return (doubles + integers) * responses + 1;
}

void objective(const Batch& batch, const int64_t* group, const Options& options, double* scratch, double* values,
               cudaStream_t stream) {
    const ObjectiveMemory memory{scratch, batch.responses, batch.objectives};
    launch(objective_kernel, 1, THREADS, stream, batch, group, options, memory, values);
}

}  // namespace mopo
