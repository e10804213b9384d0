// Python module mopo_kernels._cuda: checks arguments and forwards. The current device must be the one of the addresses;
// `queue` is a stream.
#include "../arguments.h"

#include "batch.h"
#include "fold.h"
#include "sample.h"

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

void sample(const Tile& tile, const Transform& transform, const Samples& samples, const std::vector<Address>& per_row,
            double floor, int64_t queue) {
    fold_sample(tile, transform, sampling_of(tile, samples, per_row, floor), samples, stream_of(queue));
}

// start, stop and source_row of the lists; of the last one and of the values there may be none.
void rows_of_lists(const std::vector<Address>& lists, const Tensor& value, const Matrix& matrix, const Matrix& out,
                   int64_t queue) {
    if (lists.size() != 3) throw std::invalid_argument("lists are start, stop and source_row");
    check_rows(out.rows, {lists[0], lists[1]});
    check_product(dtype_of(value.second), matrix, out);
    sum_rows({pointer<const int64_t>(lists[0]), pointer<const int64_t>(lists[1]), pointer<const int32_t>(lists[2]),
              pointer<const void>(value.first)},
             matrix, out, stream_of(queue));
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
    m.doc() = "Kernels of the CUDA backend (csrc/cuda/fold.h, csrc/cuda/sample.h, csrc/cuda/batch.h).";
    m.attr("ARCHITECTURES") = MOPO_CUDA_ARCHS;  // of setup.py
    define_structs(m);
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("sample", &sample);
    m.def("sum_rows", &rows_of_lists);
    m.def("sequence_sums", &sums);
    m.def("label_statistics", &statistics_of_labels);
    m.def("statistics_scratch", &statistics_scratch);
    m.def("labels_scratch", &labels_scratch);
}
