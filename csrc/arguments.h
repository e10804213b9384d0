// Arguments of the Python modules: addresses, sizes, strides and dtype names, nothing of torch. Checked, then typed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "contract.h"

namespace mopo {

using Address = uintptr_t;
using Tensor = std::pair<Address, std::string>;  // and dtype

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline DType dtype_of(const std::string& name) {
    if (name == "float32") return DType::float32;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float16") return DType::float16;
    if (name == "float64") return DType::float64;
    throw std::invalid_argument("dtype '" + name + "' is none of float32, bfloat16, float16, float64");
}

inline Tile tile_of(Address data, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                    int64_t first_column, Address bias, Address target) {
    if (rows < 0 || columns < 0 || first_column < 0) throw std::invalid_argument("negative tile size or first_column");
    if (rows > 1 && row_stride < columns) throw std::invalid_argument("rows of the tile overlap");
    if (rows > 0 && columns > 0 && !data) throw std::invalid_argument("tile has no data");
    if (rows > 0 && !target) throw std::invalid_argument("tile has no targets");
    return {pointer<void>(data),       dtype_of(dtype),     rows, columns, row_stride, first_column,
            pointer<const void>(bias), pointer<const int64_t>(target)};
}

inline void check_rows(int64_t rows, std::initializer_list<Address> per_row) {
    for (Address address : per_row)
        if (rows > 0 && !address) throw std::invalid_argument("a per-row array is missing");
}

inline Floats floats(const Tensor& tensor) {
    const std::string& dtype = tensor.second;
    if (dtype != "float32" && dtype != "float64")
        throw std::invalid_argument("dtype '" + dtype + "' is none of float32, float64");
    return {pointer<const void>(tensor.first), dtype == "float32"};
}

inline Floats floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : Floats{nullptr, false}; }

inline Sequences sequences_of(const Tensor& logp, int64_t logp_row_stride, Address target, int64_t target_row_stride,
                              int64_t rows, int64_t columns) {
    if (rows < 0 || columns < 0) throw std::invalid_argument("negative size");
    check_rows(rows * columns, {logp.first, target});
    return {rows, columns, floats(logp), logp_row_stride, pointer<const int64_t>(target), target_row_stride};
}

inline PolicyStep policy_step_of(const std::string& name) {
    if (name == "clone") return PolicyStep::clone;
    if (name == "contrast") return PolicyStep::contrast;
    if (name == "regress") return PolicyStep::regress;
    throw std::invalid_argument("policy_step '" + name + "' is none of clone, contrast, regress");
}

// A batch whose groups are yet to be sorted.
inline Batch batch_of(int64_t responses, int64_t objectives, const Tensor& logp, const Tensor& win_rate,
                      const Tensor& multipliers, const std::optional<Tensor>& ref_logp,
                      const std::optional<Tensor>& lag_log_ratio, Address kept) {
    if (responses < 1 || objectives < 1) throw std::invalid_argument("a batch has a response and an objective");
    check_rows(responses, {logp.first, win_rate.first, multipliers.first});
    return {responses,        objectives,          0,
            floats(logp),     floats(win_rate),    floats(multipliers),
            floats(ref_logp), floats(lag_log_ratio), pointer<const bool>(kept),
            nullptr,          nullptr};
}

}  // namespace mopo
