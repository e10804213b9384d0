// Python module mopo_kernels._cpu: addresses, sizes and strides in, nothing of torch. Checks arguments and forwards.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "batch.h"
#include "fold.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

mopo::DType dtype_of(const std::string& name) {
    if (name == "float32") return mopo::DType::float32;
    if (name == "bfloat16") return mopo::DType::bfloat16;
    if (name == "float16") return mopo::DType::float16;
    if (name == "float64") return mopo::DType::float64;
    throw std::invalid_argument("dtype '" + name + "' is none of float32, bfloat16, float16, float64");
}

mopo::Isa isa_of(const std::string& name) {
    if (name == "portable") return mopo::Isa::portable;
    if (name == "avx2") return mopo::Isa::avx2;
    if (name == "avx512") return mopo::Isa::avx512;
    throw std::invalid_argument("instruction set '" + name + "' is none of portable, avx2, avx512");
}

std::string isa_name(mopo::Isa isa) {
    if (isa == mopo::Isa::avx512) return "avx512";
    return isa == mopo::Isa::avx2 ? "avx2" : "portable";
}

mopo::Tile tile_of(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                   int64_t first_column, Address bias, Address target) {
    if (rows < 0 || columns < 0 || first_column < 0) throw std::invalid_argument("negative tile size or first_column");
    if (rows > 1 && row_stride < columns) throw std::invalid_argument("rows of the tile overlap");
    if (rows > 0 && columns > 0 && !data) throw std::invalid_argument("tile has no data");
    if (rows > 0 && !target) throw std::invalid_argument("tile has no targets");
    return {pointer<void>(data),       dtype_of(dtype),     rows, columns, row_stride, first_column,
            pointer<const void>(bias), pointer<const int64_t>(target)};
}

void check_rows(int64_t rows, std::initializer_list<Address> per_row, int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be positive");
    for (Address address : per_row)
        if (rows > 0 && !address) throw std::invalid_argument("a per-row array is missing");
}

void statistics(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
                Address max, Address sum, Address target_logit, int threads) {
    const auto tile = tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    check_rows(rows, {max, sum, target_logit}, threads);
    const py::gil_scoped_release release;
    mopo::fold_statistics(tile, {inner, outer, softcap},
                          {pointer<double>(max), pointer<double>(sum), pointer<double>(target_logit)}, threads);
}

void gradient(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
              Address lse, Address coefficient, Address out, int64_t out_row_stride, int threads) {
    const auto tile = tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    check_rows(rows, {lse, coefficient, columns > 0 ? out : target}, threads);
    const py::gil_scoped_release release;
    mopo::fold_gradient(tile, {inner, outer, softcap}, pointer<double>(lse), pointer<double>(coefficient),
                        pointer<void>(out), out_row_stride, threads);
}

void peaks(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride, Address bias,
           double inner, double outer, bool softcap, Address lse, int64_t block, Address peak, int threads) {
    if (block < 1) throw std::invalid_argument("block must be positive");
    const auto tile = tile_of(data, dtype, rows, columns, row_stride, 0, bias, lse);  // peaks read no targets
    check_rows(rows, {lse, columns > 0 ? peak : lse}, threads);
    const py::gil_scoped_release release;
    mopo::fold_peaks(tile, {inner, outer, softcap}, pointer<double>(lse), block, pointer<double>(peak), threads);
}

mopo::PolicyStep policy_step_of(const std::string& name) {
    if (name == "clone") return mopo::PolicyStep::clone;
    if (name == "contrast") return mopo::PolicyStep::contrast;
    if (name == "regress") return mopo::PolicyStep::regress;
    throw std::invalid_argument("policy_step '" + name + "' is none of clone, contrast, regress");
}

bool is_float32(const std::string& dtype) {
    if (dtype == "float32" || dtype == "float64") return dtype == "float32";
    throw std::invalid_argument("dtype '" + dtype + "' is none of float32, float64");
}

using Tensor = std::pair<Address, std::string>;  // and dtype

mopo::Floats floats(const Tensor& tensor) { return {pointer<const void>(tensor.first), is_float32(tensor.second)}; }

mopo::Floats floats(const std::optional<Tensor>& tensor) {
    return tensor ? floats(*tensor) : mopo::Floats{nullptr, false};
}

void sequence_sums(const Tensor& logp, int64_t logp_row_stride, Address target, int64_t target_row_stride,
                   int64_t rows, int64_t columns, int64_t ignore_index, Address sums, Address counts, int threads) {
    if (rows < 0 || columns < 0) throw std::invalid_argument("negative size");
    check_rows(rows * columns, {logp.first, target}, threads);
    check_rows(rows, {sums, counts}, threads);
    const mopo::Sequences sequences{rows, columns, pointer<const void>(logp.first), is_float32(logp.second),
                                    logp_row_stride, pointer<const int64_t>(target), target_row_stride};
    const py::gil_scoped_release release;
    mopo::sequence_sums(sequences, ignore_index, pointer<double>(sums), pointer<int64_t>(counts), threads);
}

void objective(int64_t responses, int64_t objectives, const Tensor& logp, const Tensor& win_rate, Address group,
               const Tensor& multipliers, const std::optional<Tensor>& ref_logp,
               const std::optional<Tensor>& lag_log_ratio, Address kept, double tau, double eps,
               const std::string& policy_step, bool normalize, int64_t primary, Address values) {
    if (responses < 1 || objectives < 1) throw std::invalid_argument("a batch has a response and an objective");
    check_rows(responses, {logp.first, win_rate.first, group, multipliers.first, values}, 1);
    const mopo::Options options{tau, eps, policy_step_of(policy_step), normalize, primary};
    if (options.policy_step != mopo::PolicyStep::clone && !ref_logp) throw std::invalid_argument("ref_logp is missing");
    const mopo::Batch batch{responses, objectives, 0, floats(logp), floats(win_rate), floats(multipliers),
                            floats(ref_logp), floats(lag_log_ratio), pointer<const bool>(kept), nullptr, nullptr};
    const py::gil_scoped_release release;
    mopo::objective(batch, pointer<const int64_t>(group), options, pointer<double>(values));
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
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("peaks", &peaks);
    m.def("sequence_sums", &sequence_sums);
    m.def("objective", &objective);
    m.def("advise_huge_pages", &advise_huge_pages);
    m.def("exp", [](Address x, Address y, int64_t size) {
        mopo::vector_exp(pointer<float>(x), pointer<float>(y), size);
    });
    m.def("tanh", [](Address x, Address y, int64_t size) {
        mopo::vector_tanh(pointer<float>(x), pointer<float>(y), size);
    });
    m.def("isa", [] { return isa_name(mopo::current_isa()); });
    m.def("isa_supported", [](const std::string& name) { return mopo::isa_supported(isa_of(name)); });
    m.def("choose_isa", [](const std::string& name) { mopo::choose_isa(isa_of(name)); });
}
