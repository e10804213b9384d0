// Every row kernel on ragged tiles against plain loops in double; built with ASan and UBSan by tests/backends/test_sanitizers.py.
// Tiles are allocated to the byte, so that a read or write past a tail is caught.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

#include "encode.h"
#include "fold.h"

namespace {

int failures = 0;

void expect_close(double got, double expected, double tolerance, const char* what, int64_t columns) {
    if (std::abs(got - expected) <= tolerance) return;
    std::printf("%s: got %.9g, expected %.9g (columns %lld)\n", what, got, expected, static_cast<long long>(columns));
    ++failures;
}

template <class T>
void check(mopo::DType dtype, int64_t rows, int64_t columns, bool with_bias, bool softcap, std::mt19937& random) {
    const mopo::Transform transform{0.5, softcap ? 3.0 : 1.0, softcap};
    using Bias = std::conditional_t<std::is_same_v<T, double>, double, float>;
    std::unique_ptr<T[]> data(new T[rows * columns]);
    std::unique_ptr<Bias[]> bias(new Bias[columns]);
    std::vector<double> z(rows * columns), slope(rows * columns);
    std::uniform_int_distribution<int> eighths(-80, 80);
    for (int64_t c = 0; c < columns; ++c) bias[c] = static_cast<Bias>(eighths(random) / 8.0);
    for (int64_t i = 0; i < rows * columns; ++i) {
        const double x = eighths(random) / 8.0;
        data[i] = encode<T>(x);
        const double u = transform.inner * (x + (with_bias ? bias[i % columns] : 0));
        z[i] = softcap ? transform.outer * std::tanh(u) : u;
        slope[i] = transform.inner * (softcap ? transform.outer * (1 - std::tanh(u) * std::tanh(u)) : 1);
    }
    std::vector<int64_t> target(rows);
    std::vector<double> max(rows, -INFINITY), sum(rows, 0), at_target(rows, -INFINITY), lse(rows), coefficient(rows);
    std::vector<double> weighted(rows, 0), of_lse(rows);
    for (int64_t r = 0; r < rows; ++r) {
        target[r] = random() % columns;
        coefficient[r] = r % 3 - 1;
        of_lse[r] = r % 2;
    }
    const mopo::Tile tile{data.get(), dtype, rows, columns, columns, 0, with_bias ? bias.get() : nullptr, target.data()};
    mopo::fold_statistics(tile, transform, {max.data(), sum.data(), at_target.data(), weighted.data()}, 2);
    for (int64_t r = 0; r < rows; ++r) {
        double total = 0, mean = 0;
        for (int64_t c = 0; c < columns; ++c) {
            total += std::exp(z[r * columns + c]);
            mean += std::exp(z[r * columns + c]) * z[r * columns + c];
        }
        lse[r] = max[r] + std::log(sum[r]);
        expect_close(lse[r], std::log(total), 2e-6, "lse", columns);
        expect_close(max[r] + weighted[r] / sum[r], mean / total, 1e-5, "mean", columns);
        expect_close(at_target[r], z[r * columns + target[r]], 2e-6, "target", columns);
    }
    mopo::fold_gradient(tile, transform, {lse.data(), coefficient.data(), of_lse.data(), data.get(), columns}, 2);
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {  // the other two have no arithmetic here
        for (int64_t i = 0; i < rows * columns; ++i) {
            const int64_t r = i / columns;
            const double onehot = i % columns == target[r], p = std::exp(z[i] - lse[r]);
            const double expected = (coefficient[r] * (onehot - p) + of_lse[r] * p) * slope[i];
            expect_close(data[i], expected, 3e-6, "gradient", columns);
        }
    }
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (mopo::Isa isa : {mopo::Isa::portable, mopo::Isa::avx2, mopo::Isa::avx512}) {
        if (!mopo::isa_supported(isa)) continue;
        mopo::choose_isa(isa);
        for (int64_t columns : {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 127, 1023, 1024, 1025, 2051})
            for (int options = 0; options < 4; ++options) {
                const bool bias = options & 1, softcap = options & 2;
                check<float>(mopo::DType::float32, 5, columns, bias, softcap, random);
                check<double>(mopo::DType::float64, 5, columns, bias, softcap, random);
                check<mopo::bfloat16>(mopo::DType::bfloat16, 5, columns, bias, softcap, random);
                check<mopo::float16>(mopo::DType::float16, 5, columns, bias, softcap, random);
            }
        std::vector<float> x = {-INFINITY, INFINITY, NAN, 0, -104, 89, 1}, y(x.size());
        mopo::vector_exp(x.data(), y.data(), static_cast<int64_t>(x.size()));
        mopo::vector_tanh(x.data(), y.data(), static_cast<int64_t>(x.size()));
    }
    if (failures == 0) std::puts("ok");
    return failures != 0;
}
