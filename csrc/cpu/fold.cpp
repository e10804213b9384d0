// Choice of the instruction set and the loops over rows.
#include "fold.h"

#include <stdexcept>

namespace mopo {
namespace {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define MOPO_X86 1
#endif

constexpr int ROWS_AT_A_TIME = 4;  // threads share rows as they go: rows that are skipped cost nothing

const RowKernels& kernels_of(Isa isa) {
#ifdef MOPO_X86
    if (isa == Isa::avx512) return avx512_kernels;
    if (isa == Isa::avx2) return avx2_kernels;
#endif
    return portable_kernels;
}

Isa best_isa() {
    for (Isa isa : {Isa::avx512, Isa::avx2})
        if (isa_supported(isa)) return isa;
    return Isa::portable;
}

Isa& active_isa() {
    static Isa isa = best_isa();
    return isa;
}

const char* row_of(const Tile& tile, int64_t row) {
    return static_cast<const char*>(tile.data) + row * tile.row_stride * element_size(tile.dtype);
}

}  // namespace

bool isa_supported(Isa isa) {
#ifdef MOPO_X86
    if (isa == Isa::avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == Isa::avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return isa == Isa::portable;
}

Isa current_isa() { return active_isa(); }
const RowKernels& current_kernels() { return kernels_of(active_isa()); }

void choose_isa(Isa isa) {
    if (!isa_supported(isa)) throw std::invalid_argument("this CPU does not have the instruction set asked for");
    active_isa() = isa;
}

void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, int threads) {
    const RowKernels& kernels = current_kernels();
    const int type = static_cast<int>(tile.dtype);
    const int64_t element = element_size(tile.dtype);
    const int64_t bias_element = tile.dtype == DType::float64 ? 8 : 4;
    const char* bias = static_cast<const char*>(tile.bias);
    const bool has_weighted = statistics.weighted != nullptr;
#pragma omp parallel for num_threads(threads) schedule(dynamic, ROWS_AT_A_TIME)
    for (int64_t row = 0; row < tile.rows; ++row) {
        if (tile.target[row] < 0) continue;
        const char* x = row_of(tile, row);
        const Statistics of_row{statistics.maximum + row, statistics.total + row, statistics.chosen + row,
                                has_weighted ? statistics.weighted + row : nullptr};
        kernels.statistics[has_weighted][type](x, tile.columns, bias, transform, of_row);
        const int64_t target = tile.target[row] - tile.first_column;
        if (target >= 0 && target < tile.columns)
            *of_row.chosen =
                kernels.value[type](x + target * element, bias ? bias + target * bias_element : nullptr, transform);
    }
}

void fold_gradient(const Tile& tile, const Transform& transform, const GradientRows& gradient, int threads) {
    const RowKernels& kernels = current_kernels();
    const int type = static_cast<int>(tile.dtype);
    const int64_t out_bytes = gradient.row_stride * element_size(tile.dtype);
#pragma omp parallel for num_threads(threads) schedule(dynamic, ROWS_AT_A_TIME)
    for (int64_t row = 0; row < tile.rows; ++row) {
        const RowGradient of_row{gradient.lse[row], gradient.coefficient[row],
                                 gradient.lse_coefficient ? gradient.lse_coefficient[row] : 0,
                                 tile.target[row] - tile.first_column,
                                 static_cast<char*>(gradient.out) + row * out_bytes};
        kernels.gradient[type](row_of(tile, row), tile.columns, tile.bias, transform, of_row);
    }
}

void vector_exp(const float* x, float* y, int64_t size) { current_kernels().exp(x, y, size); }
void vector_tanh(const float* x, float* y, int64_t size) { current_kernels().tanh(x, y, size); }

}  // namespace mopo
