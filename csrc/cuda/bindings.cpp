// Python module mopo_kernels._cuda: checks arguments and forwards. The current device must be the one of the addresses;
// `queue` is a stream.
#include "../arguments.h"

#include "batch.h"
#include "fold.h"

using namespace mopo;

namespace {

cudaStream_t stream_of(int64_t queue) { return pointer<CUstream_st>(static_cast<Address>(queue)); }

void statistics(const Tile& tile, const Transform& transform, const std::vector<Address>& running, Address scratch,
                int64_t queue) {
    check_rows(statistics_scratch(tile), {scratch});
    fold_statistics(tile, transform, statistics_of(tile, running), pointer<double>(scratch), stream_of(queue));
}

void gradient(const Tile& tile, const Transform& transform, const std::vector<Address>& per_row, Address out,
              int64_t row_stride, int64_t queue) {
    fold_gradient(tile, transform, gradient_of(tile, per_row, out, row_stride), stream_of(queue));
}

void sums(const Sequences& sequences, Address sums, Address counts, int64_t queue) {
    check_rows(sequences.rows, {sums, counts});
    sequence_sums(sequences, pointer<double>(sums), pointer<int64_t>(counts), stream_of(queue));
}

void statistics_of_labels(const Labels& labels, Address slot, Address values, Address scratch, int64_t queue) {
    check_rows(labels.responses, {slot, values, scratch});
    label_statistics(labels, pointer<int64_t>(slot), pointer<double>(values), pointer<double>(scratch),
                     stream_of(queue));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Kernels of the CUDA backend (csrc/cuda/fold.h, csrc/cuda/batch.h).";
    m.attr("ARCHITECTURES") = MOPO_CUDA_ARCHS;  // of setup.py
    define_structs(m);
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("sequence_sums", &sums);
    m.def("label_statistics", &statistics_of_labels);
    m.def("statistics_scratch", &statistics_scratch);
    m.def("labels_scratch", &labels_scratch);
}
