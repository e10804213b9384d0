// What both Python modules take: addresses, sizes, strides and dtype names, nothing of torch. Checked, then typed.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "contract.h"

namespace mopo {

namespace py = pybind11;
using py::arg;

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

// So many arrays, or one more.
inline void check_count(const std::vector<Address>& per_row, size_t count) {
    if (per_row.size() != count && per_row.size() != count + 1)
        throw std::invalid_argument(std::to_string(per_row.size()) + " per-row arrays are none of what the kernel takes");
}

inline void check_rows(int64_t rows, const std::vector<Address>& per_row) {
    for (Address address : per_row)
        if (rows > 0 && !address) throw std::invalid_argument("a per-row array is missing");
}

inline Tile tile_of(const Tensor& logits, int64_t rows, int64_t columns, int64_t row_stride, int64_t first_column,
                    Address bias, Address target) {
    if (rows < 0 || columns < 0 || first_column < 0) throw std::invalid_argument("negative tile size or first_column");
    if (rows > 1 && row_stride < columns) throw std::invalid_argument("rows of the tile overlap");
    if (rows > 0 && columns > 0 && !logits.first) throw std::invalid_argument("tile has no data");
    check_rows(rows, {target});
    return {pointer<void>(logits.first), dtype_of(logits.second),   rows,
            columns,                     row_stride,                first_column,
            pointer<const void>(bias),   pointer<const int64_t>(target)};
}

// maximum, total, chosen, and weighted where the entropy is asked for.
inline Statistics statistics_of(const Tile& tile, const std::vector<Address>& running) {
    check_count(running, 3);
    check_rows(tile.rows, running);
    return {pointer<double>(running[0]), pointer<double>(running[1]), pointer<double>(running[2]),
            running.size() > 3 ? pointer<double>(running[3]) : nullptr};
}

// lse, coefficient, and lse_coefficient where there is one.
inline GradientRows gradient_of(const Tile& tile, const std::vector<Address>& per_row, Address out,
                                int64_t row_stride) {
    check_count(per_row, 2);
    check_rows(tile.columns > 0 ? tile.rows : 0, per_row);
    check_rows(tile.columns > 0 ? tile.rows : 0, {out});
    return {pointer<const double>(per_row[0]), pointer<const double>(per_row[1]),
            per_row.size() > 2 ? pointer<const double>(per_row[2]) : nullptr, pointer<void>(out), row_stride};
}

inline Floats floats(const Tensor& tensor) {
    const std::string& dtype = tensor.second;
    if (dtype != "float32" && dtype != "float64")
        throw std::invalid_argument("dtype '" + dtype + "' is none of float32, float64");
    return {pointer<const void>(tensor.first), dtype == "float32"};
}

inline Sequences sequences_of(const Tensor& logp, Address target, std::pair<int64_t, int64_t> shape,
                              std::pair<int64_t, int64_t> row_strides, int64_t ignore_index) {
    const auto [rows, columns] = shape;
    if (rows < 0 || columns < 0) throw std::invalid_argument("negative size");
    check_rows(rows * columns, {logp.first, target});
    return {rows,         columns, floats(logp), row_strides.first, pointer<const int64_t>(target), row_strides.second,
            ignore_index};
}

inline Labels labels_of(std::pair<int64_t, int64_t> shape, const Tensor& win_rate, Address group,
                        const Tensor& multipliers, const std::optional<Tensor>& lag_log_ratio,
                        const Settings& settings) {
    const auto [responses, objectives] = shape;
    if (responses < 1 || objectives < 1) throw std::invalid_argument("a batch has a response and an objective");
    check_rows(responses, {win_rate.first, group, multipliers.first});
    const Floats lag = lag_log_ratio ? floats(*lag_log_ratio) : Floats{nullptr, false};
    return {responses, objectives, floats(win_rate), pointer<const int64_t>(group), floats(multipliers), lag, settings};
}

// The structs of the two modules, made by keyword.
inline void define_structs(py::module_& m) {
    const py::module_local local;
    py::class_<Transform>(m, "Transform", local)
        .def(py::init([](double inner, double outer, bool softcap) { return Transform{inner, outer, softcap}; }),
             arg("inner"), arg("outer"), arg("softcap"));
    py::class_<Tile>(m, "Tile", local)
        .def(py::init(&tile_of), arg("logits"), arg("rows"), arg("columns"), arg("row_stride"), arg("first_column"),
             arg("bias"), arg("target"));
    py::class_<Sequences>(m, "Sequences", local)
        .def(py::init(&sequences_of), arg("logp"), arg("target"), arg("shape"), arg("row_strides"),
             arg("ignore_index"));
    py::class_<Settings>(m, "Settings", local)
        .def(py::init([](double tau, double eps, int64_t primary) { return Settings{tau, eps, primary}; }), arg("tau"),
             arg("eps"), arg("primary"));
    py::class_<Labels>(m, "Labels", local)
        .def(py::init(&labels_of), arg("shape"), arg("win_rate"), arg("group"), arg("multipliers"),
             arg("lag_log_ratio"), arg("settings"));
}

}  // namespace mopo
