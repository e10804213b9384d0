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

inline Samples samples_of(Address columns, const Tensor& values, Address counts, std::pair<int64_t, int64_t> shape) {
    const auto [rows, capacity] = shape;
    if (rows < 0 || capacity < 0) throw std::invalid_argument("negative size");
    const DType dtype = dtype_of(values.second);
    if (element_size(dtype) < 4) throw std::invalid_argument("values of samples are float32 or float64");
    check_rows(rows * capacity, {columns, values.first, counts});
    return {pointer<int32_t>(columns), pointer<void>(values.first), dtype, pointer<int32_t>(counts), rows, capacity};
}

inline Matrix matrix_of(const Tensor& data, std::pair<int64_t, int64_t> shape, int64_t row_stride) {
    const auto [rows, columns] = shape;
    if (rows < 0 || columns < 0) throw std::invalid_argument("negative size");
    if (rows > 1 && row_stride < columns) throw std::invalid_argument("rows of the matrix overlap");
    check_rows(rows * columns, {data.first});
    return {pointer<void>(data.first), dtype_of(data.second), rows, columns, row_stride};
}

// The values' dtype, as that of what they were drawn from or are multiplied with asks for it.
inline void check_values(DType values, DType dtype) {
    if (values != (dtype == DType::float64 ? DType::float64 : DType::float32))
        throw std::invalid_argument("values of samples are float64 beside float64 and float32 beside what is narrower");
}

inline Sampling sampling_of(const Tile& tile, const Samples& samples, const std::vector<Address>& per_row,
                            double floor) {
    if (per_row.size() != 2) throw std::invalid_argument("the kernel takes lse and running sums");
    if (samples.rows != tile.rows) throw std::invalid_argument("tile and samples differ in rows");
    if (!(floor > 0 && floor < 1)) throw std::invalid_argument("the floor lies between 0 and 1");
    check_rows(tile.rows, per_row);
    check_values(samples.dtype, tile.dtype);
    return {pointer<const double>(per_row[0]), pointer<double>(per_row[1]), floor};
}

// Of values with rows of a matrix.
inline void check_product(DType values, const Matrix& matrix, const Matrix& out) {
    check_values(values, matrix.dtype);
    if (out.dtype != matrix.dtype && out.dtype != values)
        throw std::invalid_argument("a product has the dtype of its matrix or of the values");
    if (matrix.columns != out.columns) throw std::invalid_argument("sizes of matrix and product do not fit");
}

// Of samples with a matrix that has a row for each column of theirs, or (transposed) for each row of theirs.
inline void check_product(const Samples& samples, const Matrix& matrix, const Matrix& out, bool transposed) {
    check_product(samples.dtype, matrix, out);
    if (samples.rows != (transposed ? matrix : out).rows)
        throw std::invalid_argument("sizes of samples, matrix and product do not fit");
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
    py::class_<Samples>(m, "Samples", local)
        .def(py::init(&samples_of), arg("columns"), arg("values"), arg("counts"), arg("shape"));
    py::class_<Matrix>(m, "Matrix", local)
        .def(py::init(&matrix_of), arg("data"), arg("shape"), arg("row_stride"));
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
