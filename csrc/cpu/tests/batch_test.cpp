// Sums of ragged rows and label statistics against plain loops in double; built with ASan and UBSan by
// tests/test_sanitizers.py. All arrays are allocated to the byte.
#include "../batch.h"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

namespace {

int failures = 0;

void expect_close(double got, double expected, const char* what, int64_t size) {
    if (std::abs(got - expected) <= 1e-9 * (1 + std::abs(expected))) return;
    std::printf("%s: got %.12g, expected %.12g (size %lld)\n", what, got, expected, static_cast<long long>(size));
    ++failures;
}

template <class T>
void check_sums(int64_t rows, int64_t columns, std::mt19937& random) {
    std::unique_ptr<T[]> logp(new T[rows * columns]);
    std::unique_ptr<int64_t[]> target(new int64_t[rows * columns]), counts(new int64_t[rows]);
    std::unique_ptr<double[]> sums(new double[rows]);
    for (int64_t i = 0; i < rows * columns; ++i) {
        target[i] = random() % 3 == 0 ? -100 : 5;
        logp[i] = target[i] == -100 ? static_cast<T>(NAN) : static_cast<T>(random() % 64) / 8;
    }
    mopo::sequence_sums({rows, columns, {logp.get(), sizeof(T) == 4}, columns, target.get(), columns, -100}, sums.get(),
                        counts.get(), 2);
    for (int64_t row = 0; row < rows; ++row) {
        double sum = 0;
        int64_t count = 0;
        for (int64_t i = row * columns; i < (row + 1) * columns; ++i)
            if (target[i] != -100) sum += logp[i], ++count;
        expect_close(sums[row], sum, "sum", columns);
        expect_close(counts[row], count, "count", columns);
    }
}

// Groups of two and three, interleaved; objective 1 is unlabelled in the first group.
void check_labels(int64_t responses, std::mt19937& random) {
    const int64_t objectives = 2, groups = responses / 2;
    std::uniform_real_distribution<double> uniform(0, 1);
    std::unique_ptr<double[]> win_rate(new double[responses * objectives]), multipliers(new double[objectives]{1, 0.5});
    std::unique_ptr<int64_t[]> group(new int64_t[responses]), slot(new int64_t[responses]);
    for (int64_t i = 0; i < responses; ++i) {
        group[i] = 7 - 3 * (i % groups);
        win_rate[2 * i] = uniform(random);
        win_rate[2 * i + 1] = i % groups == 0 ? NAN : uniform(random);
    }
    const double tau = 0.3;
    const mopo::Labels labels{responses,   objectives, {win_rate.get(), false}, group.get(), {multipliers.get(), false},
                              {nullptr, false}, {tau, 0.05, 0}};
    std::unique_ptr<double[]> values(new double[4 + 3 * responses + 3 * objectives]);
    mopo::label_statistics(labels, slot.get(), values.get());
    const mopo::Results out = mopo::Results::of(slot.get(), values.get(), responses, objectives);
    expect_close(*out.valid, 1, "valid", responses);
    expect_close(*out.num_groups, groups, "groups", responses);
    for (int64_t i = 0; i < responses; ++i) {
        double weights = 0, size = 0;
        const auto score = [&](int64_t j) { return win_rate[2 * j] + (j % groups == 0 ? 0 : 0.5 * win_rate[2 * j + 1]); };
        for (int64_t j = i % groups; j < responses; j += groups) {
            weights += std::exp((score(j) - score(i)) / tau), ++size;
            expect_close(out.slot[j], out.slot[i], "slot", responses);
        }
        expect_close(out.size[i], size, "size", responses);
        expect_close(out.score[i], score(i) / tau, "score", responses);
        expect_close(out.weights[i], 1 / weights, "weight", responses);
    }
    for (int64_t k = 0; k < objectives; ++k) {
        const bool is_labelled = k == 0 || groups > 1;
        if (is_labelled != (out.lower_bounds[k] <= out.win_rates[k])) std::puts("bound above the estimate"), ++failures;
    }
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (int64_t columns : {0, 1, 7, 64, 1001}) {
        check_sums<float>(3, columns, random);
        check_sums<double>(3, columns, random);
    }
    for (int64_t responses : {2, 3, 4, 7, 64, 501}) check_labels(responses, random);
    if (failures == 0) std::puts("ok");
    return failures != 0;
}
