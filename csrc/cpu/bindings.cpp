// Python module mopo_kernels._cpu: addresses, sizes and strides in, nothing of torch. Checks arguments and forwards.
#include "../arguments.h"
#include "batch.h"
#include "fold.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

using mopo::Address;
using mopo::pointer;
using mopo::Tensor;

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

void check_threads(int threads) {
    if (threads < 1) throw std::invalid_argument("threads must be positive");
}

void statistics(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
                Address max, Address sum, Address target_logit, int threads) {
    const mopo::Tile tile = mopo::tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    mopo::check_rows(rows, {max, sum, target_logit});
    check_threads(threads);
    const py::gil_scoped_release release;
    mopo::fold_statistics(tile, {inner, outer, softcap},
                          {pointer<double>(max), pointer<double>(sum), pointer<double>(target_logit)}, threads);
}

void gradient(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
              Address lse, Address coefficient, Address out, int64_t out_row_stride, int threads) {
    const mopo::Tile tile = mopo::tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    mopo::check_rows(rows, {lse, coefficient, columns > 0 ? out : target});
    check_threads(threads);
    const py::gil_scoped_release release;
    mopo::fold_gradient(tile, {inner, outer, softcap}, pointer<double>(lse), pointer<double>(coefficient),
                        pointer<void>(out), out_row_stride, threads);
}

void peaks(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride, Address bias,
           double inner, double outer, bool softcap, Address lse, int64_t block, Address peak, int threads) {
    if (block < 1) throw std::invalid_argument("block must be positive");
    const mopo::Tile tile = mopo::tile_of(data, dtype, rows, columns, row_stride, 0, bias, lse);  // peaks read no targets
    mopo::check_rows(rows, {lse, columns > 0 ? peak : lse});
    check_threads(threads);
    const py::gil_scoped_release release;
    mopo::fold_peaks(tile, {inner, outer, softcap}, pointer<double>(lse), block, pointer<double>(peak), threads);
}

void sequence_sums(const Tensor& logp, int64_t logp_row_stride, Address target, int64_t target_row_stride,
                   int64_t rows, int64_t columns, int64_t ignore_index, Address sums, Address counts, int threads) {
    const mopo::Sequences sequences =
        mopo::sequences_of(logp, logp_row_stride, target, target_row_stride, rows, columns);
    mopo::check_rows(rows, {sums, counts});
    check_threads(threads);
    const py::gil_scoped_release release;
    mopo::sequence_sums(sequences, ignore_index, pointer<double>(sums), pointer<int64_t>(counts), threads);
}

void objective(int64_t responses, int64_t objectives, const Tensor& logp, const Tensor& win_rate, Address group,
               const Tensor& multipliers, const std::optional<Tensor>& ref_logp,
               const std::optional<Tensor>& lag_log_ratio, Address kept, double tau, double eps,
               const std::string& policy_step, bool normalize, int64_t primary, Address values) {
    const mopo::Batch batch =
        mopo::batch_of(responses, objectives, logp, win_rate, multipliers, ref_logp, lag_log_ratio, kept);
    const mopo::Options options{tau, eps, mopo::policy_step_of(policy_step), normalize, primary};
    if (options.policy_step != mopo::PolicyStep::clone && !ref_logp) throw std::invalid_argument("ref_logp is missing");
    mopo::check_rows(responses, {group, values});
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
