// Python module mopo_kernels._cpu: addresses, sizes and strides in, nothing of torch. Checks arguments and forwards.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "fold.h"

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

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "Fold kernels of the CPU backend (csrc/cpu/fold.h).";
    m.def("statistics", &statistics);
    m.def("gradient", &gradient);
    m.def("peaks", &peaks);
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
