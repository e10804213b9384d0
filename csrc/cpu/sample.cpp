// Sampling of rows, and the products of what was sampled: loops over rows and columns.
#include <cstring>
#include <memory>
#include <vector>

#include "fold.h"

namespace mopo {
namespace {

constexpr int ROWS_AT_A_TIME = 4;
constexpr int COLUMNS_AT_A_TIME = 64;  // of which most have few entries

char* value_at(const Samples& samples, int64_t place) {
    return static_cast<char*>(samples.values) + place * element_size(samples.dtype);
}

char* row_of(const Matrix& matrix, int64_t row) {
    return static_cast<char*>(matrix.data) + row * matrix.row_stride * element_size(matrix.dtype);
}

// Room for the sum of a row, where `out` itself is none.
std::unique_ptr<double[]> scratch(const Samples& samples, const Matrix& out) {
    return std::unique_ptr<double[]>(out.dtype == samples.dtype ? nullptr : new double[out.columns]);
}

// Entries by column, and in a column by row: those of column v stand at start[v] .. start[v + 1] - 1.
struct ByColumn {
    std::vector<int64_t> start;
    std::vector<int32_t> rows;
    std::vector<char> values;
};

ByColumn by_column(const Samples& samples, int64_t vocab) {
    ByColumn sorted;
    sorted.start.assign(vocab + 2, 0);
    int64_t* place = sorted.start.data() + 1;  // one ahead, so that filling leaves it at the starts
    for (int64_t row = 0; row < samples.rows; ++row)
        for (int32_t j = 0; j < samples.counts[row]; ++j) ++place[samples.columns[row * samples.capacity + j] + 1];
    for (int64_t v = 0; v < vocab; ++v) place[v + 1] += place[v];
    const int64_t entries = place[vocab], size = element_size(samples.dtype);
    sorted.rows.resize(entries);
    sorted.values.resize(entries * size);
    for (int64_t row = 0; row < samples.rows; ++row)
        for (int32_t j = 0; j < samples.counts[row]; ++j) {
            const int64_t from = row * samples.capacity + j, to = place[samples.columns[from]]++;
            sorted.rows[to] = static_cast<int32_t>(row);
            std::memcpy(sorted.values.data() + to * size, value_at(samples, from), size);
        }
    return sorted;
}

}  // namespace

void fold_sample(const Tile& tile, const Transform& transform, const Sampling& sampling, const Samples& samples,
                 int threads) {
    const auto sample = current_kernels().sample[static_cast<int>(tile.dtype)];
    const int64_t row_bytes = tile.row_stride * element_size(tile.dtype);
#pragma omp parallel for num_threads(threads) schedule(dynamic, ROWS_AT_A_TIME)
    for (int64_t row = 0; row < tile.rows; ++row) {
        if (tile.target[row] < 0) continue;
        const int64_t place = row * samples.capacity;
        const RowSampling of_row{sampling.lse[row],
                                 sampling.floor,
                                 sampling.running + row,
                                 tile.target[row] - tile.first_column,
                                 tile.first_column,
                                 samples.columns + place,
                                 value_at(samples, place),
                                 samples.counts + row,
                                 samples.capacity};
        sample(static_cast<const char*>(tile.data) + row * row_bytes, tile.columns, tile.bias, transform, of_row);
    }
}

void sample_hidden(const Samples& samples, const Matrix& weight, const Matrix& out, int threads) {
    const auto sum = current_kernels().sum[static_cast<int>(weight.dtype)];
#pragma omp parallel num_threads(threads)
    {
        const auto total = scratch(samples, out);
#pragma omp for schedule(dynamic, ROWS_AT_A_TIME)
        for (int64_t row = 0; row < samples.rows; ++row) {
            const int64_t place = row * samples.capacity;
            sum({&weight, samples.columns + place, value_at(samples, place), samples.counts[row], total.get(),
                 row_of(out, row)});
        }
    }
}

void sample_weight(const Samples& samples, const Matrix& hidden, const Matrix& out, int threads) {
    const auto sum = current_kernels().sum[static_cast<int>(hidden.dtype)];
    const ByColumn sorted = by_column(samples, out.rows);
#pragma omp parallel num_threads(threads)
    {
        const auto total = scratch(samples, out);
#pragma omp for schedule(dynamic, COLUMNS_AT_A_TIME)
        for (int64_t column = 0; column < out.rows; ++column) {
            const int64_t first = sorted.start[column], count = sorted.start[column + 1] - first;
            sum({&hidden, sorted.rows.data() + first, sorted.values.data() + first * element_size(samples.dtype), count,
                 total.get(), row_of(out, column)});
        }
    }
}

}  // namespace mopo
