// Python module mopo_kernels._cuda: checks arguments and forwards. The current device must be the one of the addresses.
#include "../arguments.h"
#include "batch.h"
#include "fold.h"

namespace py = pybind11;
using namespace mopo;

namespace {

cudaStream_t stream_of(Address stream) { return pointer<CUstream_st>(stream); }

void statistics(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
                Address max, Address sum, Address target_logit, Address scratch, Address stream) {
    const Tile tile = tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    check_rows(rows, {max, sum, target_logit});
    check_rows(statistics_scratch(rows, columns, tile.dtype), {scratch});
    fold_statistics(tile, {inner, outer, softcap},
                    {pointer<double>(max), pointer<double>(sum), pointer<double>(target_logit)},
                    pointer<double>(scratch), stream_of(stream));
}

void gradient(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
              int64_t first_column, Address bias, Address target, double inner, double outer, bool softcap,
              Address lse, Address coefficient, Address out, int64_t out_row_stride, Address stream) {
    const Tile tile = tile_of(data, dtype, rows, columns, row_stride, first_column, bias, target);
    check_rows(rows, {lse, coefficient, columns > 0 ? out : target});
    fold_gradient(tile, {inner, outer, softcap}, pointer<double>(lse), pointer<double>(coefficient),
                  pointer<void>(out), out_row_stride, stream_of(stream));
}

void peaks(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride, Address bias,
           double inner, double outer, bool softcap, Address lse, int64_t block, Address peak, Address stream) {
    if (block < 1) throw std::invalid_argument("block must be positive");
    const Tile tile = tile_of(data, dtype, rows, columns, row_stride, 0, bias, lse);  // peaks read no targets
    check_rows(rows, {lse, columns > 0 ? peak : lse});
    fold_peaks(tile, {inner, outer, softcap}, pointer<double>(lse), block, pointer<double>(peak), stream_of(stream));
}

void sums(const Tensor& logp, int64_t logp_row_stride, Address target, int64_t target_row_stride, int64_t rows,
          int64_t columns, int64_t ignore_index, Address sums, Address counts, Address stream) {
    const Sequences sequences = sequences_of(logp, logp_row_stride, target, target_row_stride, rows, columns);
    check_rows(rows, {sums, counts});
    sequence_sums(sequences, ignore_index, pointer<double>(sums), pointer<int64_t>(counts), stream_of(stream));
}

void fused_objective(int64_t responses, int64_t objectives, const Tensor& logp, const Tensor& win_rate, Address group,
                     const Tensor& multipliers, const std::optional<Tensor>& ref_logp,
                     const std::optional<Tensor>& lag_log_ratio, Address kept, double tau, double eps,
                     const std::string& policy_step, bool normalize, int64_t primary, Address scratch, Address values,
                     Address stream) {
    const Batch batch = batch_of(responses, objectives, logp, win_rate, multipliers, ref_logp, lag_log_ratio, kept);
    const Options options{tau, eps, policy_step_of(policy_step), normalize, primary};
    if (options.policy_step != PolicyStep::clone && !ref_logp) throw std::invalid_argument("ref_logp is missing");
    check_rows(responses, {group, scratch, values});
    objective(batch, pointer<const int64_t>(group), options, pointer<double>(scratch), pointer<double>(values),
              stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "Kernels of the CUDA backend (csrc/cuda/fold.h, csrc/cuda/batch.h).";
    m.attr("ARCHITECTURES") = MOPO_CUDA_ARCHS;  // of setup.py
    m.def("statistics_scratch", [](int64_t rows, int64_t columns, const std::string& dtype) {
        return statistics_scratch(rows, columns, dtype_of(dtype));
    });
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("peaks", &peaks);
    m.def("sequence_sums", &sums);
    m.def("objective_scratch", &objective_scratch);
    m.def("objective", &fused_objective);
}
