// Samples of ragged tiles, and their products, against plain loops in double; built with ASan and UBSan by
// tests/backends/test_sanitizers.py. All arrays are allocated to the byte.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "encode.h"
#include "fold.h"

namespace {

int failures = 0;

void expect(bool is_true, const char* what, int64_t columns) {
    if (is_true) return;
    std::printf("%s (columns %lld)\n", what, static_cast<long long>(columns));
    ++failures;
}

void expect_close(double got, double expected, double tolerance, const char* what, int64_t columns) {
    if (std::abs(got - expected) <= tolerance) return;
    std::printf("%s: got %.9g, expected %.9g (columns %lld)\n", what, got, expected, static_cast<long long>(columns));
    ++failures;
}

template <class T>
using Work = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <class T>
constexpr mopo::DType WORK = std::is_same_v<T, double> ? mopo::DType::float64 : mopo::DType::float32;

// Random multiples of 1/8 as elements of the dtype, and as they are.
template <class T>
struct Numbers {
    std::unique_ptr<T[]> data;
    std::vector<double> exact;

    Numbers(int64_t size, std::mt19937& random) : data(new T[size]), exact(size) {
        std::uniform_int_distribution<int> eighths(-40, 40);
        for (int64_t i = 0; i < size; ++i) data[i] = encode<T>(exact[i] = eighths(random) / 8.0);
    }
};

template <class T>
struct Entries {
    std::unique_ptr<int32_t[]> columns, counts;
    std::unique_ptr<Work<T>[]> values;
    mopo::Samples samples;

    Entries(int64_t rows, int64_t capacity)
        : columns(new int32_t[rows * capacity]), counts(new int32_t[rows]()), values(new Work<T>[rows * capacity]),
          samples{columns.get(), values.get(), WORK<T>, counts.get(), rows, capacity} {}
};

// Either product with a matrix, in both dtypes that it may have.
template <class T>
void check_products(const Entries<T>& entries, mopo::DType dtype, int64_t columns, int64_t width, std::mt19937& random) {
    const mopo::Samples& samples = entries.samples;
    for (bool transposed : {false, true}) {
        const int64_t from = transposed ? samples.rows : columns, to = transposed ? columns : samples.rows;
        const Numbers<T> matrix(from * width, random);
        std::vector<double> expected(to * width, 0), size(to * width, 0);
        for (int64_t r = 0; r < samples.rows; ++r)
            for (int64_t j = 0; j < entries.counts[r]; ++j)
                for (int64_t h = 0; h < width; ++h) {
                    const int64_t column = entries.columns[r * samples.capacity + j];
                    const double term = entries.values[r * samples.capacity + j] *
                                        matrix.exact[(transposed ? r : column) * width + h];
                    expected[(transposed ? column : r) * width + h] += term;
                    size[(transposed ? column : r) * width + h] += std::abs(term);
                }
        const auto product = transposed ? mopo::sample_weight : mopo::sample_hidden;
        std::unique_ptr<T[]> narrow(new T[to * width]);
        std::unique_ptr<Work<T>[]> wide(new Work<T>[to * width]);
        const mopo::Matrix source{matrix.data.get(), dtype, from, width, width};
        product(samples, source, {narrow.get(), dtype, to, width, width}, 2);
        product(samples, source, {wide.get(), WORK<T>, to, width, width}, 2);
        for (int64_t i = 0; i < to * width; ++i) expect_close(wide[i], expected[i], 1e-6 * size[i], "product", columns);
        if constexpr (std::is_same_v<T, Work<T>>)  // 16 bits have no arithmetic here
            for (int64_t i = 0; i < to * width; ++i) expect(narrow[i] == wide[i], "another product", columns);
    }
}

template <class T>
void check(mopo::DType dtype, int64_t columns, bool with_bias, bool softcap, double floor, std::mt19937& random) {
    constexpr int64_t rows = 5;
    const mopo::Transform transform{0.5, softcap ? 3.0 : 1.0, softcap};
    const Numbers<T> logits(rows * columns, random);
    const Numbers<Work<T>> bias(columns, random);
    std::vector<double> z(rows * columns), slope(rows * columns), lse(rows, 0), uniform(rows), running(rows);
    std::vector<int64_t> target(rows);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const double u = transform.inner * (logits.exact[i] + (with_bias ? bias.exact[i % columns] : 0));
        z[i] = softcap ? transform.outer * std::tanh(u) : u;
        slope[i] = transform.inner * (softcap ? transform.outer * (1 - std::tanh(u) * std::tanh(u)) : 1);
        lse[i / columns] += std::exp(z[i]);
    }
    for (int64_t r = 0; r < rows; ++r) {
        lse[r] = std::log(lse[r]);
        target[r] = r == 3 ? -1 : static_cast<int64_t>(random() % columns);
        running[r] = uniform[r] = (random() % 1024) / 1024.0;
    }
    const int64_t capacity = std::min<int64_t>(columns, static_cast<int64_t>(1.001 / floor) + 3);
    Entries<T> entries(rows, capacity);
    const auto sample = [&](Entries<T>& into) {  // in two tiles
        for (const auto& [first, last] : {std::pair{int64_t{0}, columns / 3}, std::pair{columns / 3, columns}}) {
            const void* of_tile = with_bias ? bias.data.get() + first : nullptr;
            const mopo::Tile tile{logits.data.get() + first, dtype, rows, last - first, columns, first, of_tile, target.data()};
            mopo::fold_sample(tile, transform, {lse.data(), running.data(), floor}, into.samples, 2);
        }
    };
    sample(entries);
    for (int64_t r = 0; r < rows; ++r) {
        double total = uniform[r];
        for (int64_t c = 0; c < columns; ++c) {
            const double p = std::exp(z[r * columns + c] - lse[r]);
            if (target[r] >= 0 && p < floor) total += p / floor;
        }
        expect_close(running[r], total, 1e-5 * (1 + 1 / floor), "running sum", columns);
        int64_t before = -1, steps = 0;
        bool has_target = target[r] < 0;
        for (int64_t j = 0; j < entries.counts[r]; ++j) {
            const int64_t column = entries.columns[r * capacity + j], place = r * columns + column;
            const double p = std::exp(z[place] - lse[r]), value = entries.values[r * capacity + j];
            const bool is_step = p < floor && value != 0;
            expect(before < column && column < columns, "columns out of order", columns);
            expect(value != 0 || column == target[r] || softcap, "an entry of nothing", columns);
            if (value != 0) expect_close(value, (is_step ? floor : p) * slope[place], 5e-6, "value", columns);
            has_target |= column == target[r];
            steps += is_step;
            before = column;
        }
        expect(has_target, "no target", columns);
        if (!softcap) expect(steps == std::floor(running[r]), "steps and running sum differ", columns);
    }
    for (int64_t width : {1, 7, 16, 37}) check_products(entries, dtype, columns, width, random);
    for (double& x : lse) x -= 5;  // more entries than there is room for
    Entries<T> full(rows, capacity);
    sample(full);
    for (int64_t r = 0; r < rows; ++r) expect(full.counts[r] <= capacity, "more entries than room", columns);
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (mopo::Isa isa : {mopo::Isa::portable, mopo::Isa::avx2, mopo::Isa::avx512}) {
        if (!mopo::isa_supported(isa)) continue;
        mopo::choose_isa(isa);
        for (int64_t columns : {1, 2, 7, 8, 9, 16, 33, 127, 1023, 1025, 2051})
            for (int options = 0; options < 8; ++options) {
                const bool bias = options & 1, softcap = options & 2;
                const double floor = options & 4 ? 0.3 : 1.0 / 64;
                check<float>(mopo::DType::float32, columns, bias, softcap, floor, random);
                check<double>(mopo::DType::float64, columns, bias, softcap, floor, random);
                check<mopo::bfloat16>(mopo::DType::bfloat16, columns, bias, softcap, floor, random);
                check<mopo::float16>(mopo::DType::float16, columns, bias, softcap, floor, random);
            }
    }
    if (failures == 0) std::puts("ok");
    return failures != 0;
}
