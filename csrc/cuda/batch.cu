// Sums over ragged rows by a block per row (floor: rows * columns targets and their logp read), and label statistics by
// one block, whose warps take the objectives in turn.
#include "batch.h"

#include "launch.cuh"
#include "team.cuh"

namespace mopo {
namespace {

constexpr int THREADS = 256;

__global__ void __launch_bounds__(THREADS)
    sequence_sums_kernel(Sequences sequences, double* sums, int64_t* counts) {
    const int64_t row = blockIdx.x, first = row * sequences.logp_row_stride;
    const int64_t* target = sequences.target + row * sequences.target_row_stride;
    const Team<THREADS> team;
    double totals[2];
    team.sum(sequences.columns, totals, [&](int64_t i, double* total) {
        if (target[i] == sequences.ignore_index) return;
        total[0] += sequences.logp[first + i];
        total[1] += 1;
    });
    team.once([&] {
        sums[row] = totals[0];
        counts[row] = static_cast<int64_t>(totals[1]);
    });
}

// Working memory: what all objectives read, two columns of each objective's own, and the sorted groups.
struct LabelMemory {
    static constexpr int64_t SHARED = 2, OWN = 2;
    double* doubles;
    int64_t responses, objectives;

    __device__ Scratch scratch(int64_t objective) const {
        double* own = doubles + (SHARED + OWN * objective) * responses;
        return {doubles, doubles + responses, own, own + responses};
    }
    __device__ int64_t* integers() const {
        return reinterpret_cast<int64_t*>(doubles + (SHARED + OWN * objectives) * responses);
    }
};

__global__ void __launch_bounds__(THREADS, 1)  // one block in all: registers are free, spills are not
    label_statistics_kernel(Labels labels, LabelMemory memory, int64_t* slot, double* values) {
    int64_t *first = memory.integers(), *order = first + labels.responses, *start = order + labels.responses;
    const Results out = Results::of(slot, values, labels.responses, labels.objectives);
    const Team<THREADS> block;
    labels.groups = sort_by_scanning(block, labels.group, labels.responses, first, order, start);
    labels.order = order;
    labels.start = start;
    weigh(block, labels, memory.scratch(0), out);
    const Team<WARP> warp;
    for (int64_t k = threadIdx.x / WARP; k < labels.objectives; k += block.WARPS)
        estimate(warp, labels, k, memory.scratch(k), out);
}

}  // namespace

void sequence_sums(const Sequences& sequences, double* sums, int64_t* counts, cudaStream_t stream) {
    if (sequences.rows == 0) return;
    launch(sequence_sums_kernel, sequences.rows, THREADS, stream, sequences, sums, counts);
}

int64_t labels_scratch(const Labels& labels) {
    const int64_t doubles = LabelMemory::SHARED + LabelMemory::OWN * labels.objectives, integers = 3;
    return (doubles + integers) * labels.responses + 1;
}

void label_statistics(const Labels& labels, int64_t* slot, double* values, double* scratch, cudaStream_t stream) {
    const LabelMemory memory{scratch, labels.responses, labels.objectives};
    launch(label_statistics_kernel, 1, THREADS, stream, labels, memory, slot, values);
}

}  // namespace mopo
