// Python module mopo_kernels._cpu: addresses, sizes and strides in, nothing of torch. Checks arguments and forwards.
#include "../arguments.h"
#include "batch.h"
#include "fold.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

using namespace mopo;

namespace {

Isa isa_of(const std::string& name) {
    if (name == "portable") return Isa::portable;
    if (name == "avx2") return Isa::avx2;
    if (name == "avx512") return Isa::avx512;
    throw std::invalid_argument("instruction set '" + name + "' is none of portable, avx2, avx512");
}

std::string isa_name(Isa isa) {
    if (isa == Isa::avx512) return "avx512";
    return isa == Isa::avx2 ? "avx2" : "portable";
}

// `queue` is the number of threads; no function here needs scratch memory.
int threads_of(int64_t queue) {
    if (queue < 1) throw std::invalid_argument("threads must be positive");
    return static_cast<int>(queue);
}

void statistics(const Tile& tile, const Transform& transform, const std::vector<Address>& running, Address,
                int64_t queue) {
    const Statistics statistics = statistics_of(tile, running);
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    fold_statistics(tile, transform, statistics, threads);
}

void gradient(const Tile& tile, const Transform& transform, const std::vector<Address>& per_row, Address out,
              int64_t row_stride, int64_t queue) {
    const GradientRows gradient = gradient_of(tile, per_row, out, row_stride);
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    fold_gradient(tile, transform, gradient, threads);
}

void sample(const Tile& tile, const Transform& transform, const Samples& samples, const std::vector<Address>& per_row,
            double floor, int64_t queue) {
    const Sampling sampling = sampling_of(tile, samples, per_row, floor);
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    fold_sample(tile, transform, sampling, samples, threads);
}

void hidden_of(const Samples& samples, const Matrix& weight, const Matrix& out, int64_t queue) {
    check_product(samples, weight, out, false);
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    sample_hidden(samples, weight, out, threads);
}

void weight_of(const Samples& samples, const Matrix& hidden, const Matrix& out, int64_t queue) {
    check_product(samples, hidden, out, true);
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    sample_weight(samples, hidden, out, threads);
}

void sums(const Sequences& sequences, Address sums, Address counts, int64_t queue) {
    check_rows(sequences.rows, {sums, counts});
    const int threads = threads_of(queue);
    const py::gil_scoped_release release;
    sequence_sums(sequences, pointer<double>(sums), pointer<int64_t>(counts), threads);
}

void statistics_of_labels(const Labels& labels, Address slot, Address values, Address, int64_t) {
    check_rows(labels.responses, {slot, values});
    const py::gil_scoped_release release;
    label_statistics(labels, pointer<int64_t>(slot), pointer<double>(values));
}

// Asks for huge pages behind memory that nobody has touched yet: gradients and tiles are new in every step, and with
// small pages the first write to each page costs more than the write. Advice only, so a refusal is no error.
void advise_huge_pages(Address data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr Address page = 2 << 20;
    const Address first = (data + page - 1) / page * page, last = (data + bytes) / page * page;
    if (first < last) madvise(pointer<void>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Kernels of the CPU backend (csrc/cpu/fold.h, csrc/cpu/batch.h).";
    define_structs(m);
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("sample", &sample);
    m.def("sample_hidden", &hidden_of);
    m.def("sample_weight", &weight_of);
    m.def("sequence_sums", &sums);
    m.def("label_statistics", &statistics_of_labels);
    m.def("statistics_scratch", [](const Tile&) { return 0; });
    m.def("labels_scratch", [](const Labels&) { return 0; });
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("exp", [](Address x, Address y, int64_t size) { vector_exp(pointer<float>(x), pointer<float>(y), size); });
    m.def("tanh", [](Address x, Address y, int64_t size) { vector_tanh(pointer<float>(x), pointer<float>(y), size); });
    m.def("isa", [] { return isa_name(current_isa()); });
    m.def("isa_supported", [](const std::string& name) { return isa_supported(isa_of(name)); });
    m.def("choose_isa", [](const std::string& name) { choose_isa(isa_of(name)); });
}
