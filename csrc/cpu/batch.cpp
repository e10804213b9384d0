// Sums over ragged rows by a thread per row (floor: rows * columns targets read), and label statistics by one thread in
// O(B log B).
#include "batch.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace mopo {
namespace {

template <class T>
void sum_row(const T* logp, const int64_t* target, int64_t columns, int64_t ignore_index, double* sum,
             int64_t* count) {
    double total = 0;
    int64_t counted = 0;
    for (int64_t i = 0; i < columns; ++i) {
        if (target[i] == ignore_index) continue;  // prompts and padding are runs, which the CPU predicts
        total += logp[i];
        ++counted;
    }
    *sum = total;
    *count = counted;
}

// A Team (labels.h) of one thread.
struct OneThread {
    template <class F>
    void for_each(int64_t n, F f) const {
        for (int64_t i = 0; i < n; ++i) f(i);
    }
    template <int N, class F>
    void sum(int64_t n, double (&total)[N], F f) const {
        std::fill(total, total + N, 0.0);
        for (int64_t i = 0; i < n; ++i) f(i, total);
    }
    template <class F>
    double min(int64_t n, F f) const {
        double smallest = INFINITY;
        for (int64_t i = 0; i < n; ++i) smallest = std::min<double>(smallest, f(i));
        return smallest;
    }
    template <class F>
    double max(int64_t n, F f) const {
        double largest = -INFINITY;
        for (int64_t i = 0; i < n; ++i) largest = std::max<double>(largest, f(i));
        return largest;
    }
    template <class F>
    void once(F f) const {
        f();
    }
};

}  // namespace

void sequence_sums(const Sequences& sequences, double* sums, int64_t* counts, int threads) {
    const auto sum_rows = [&](const auto* logp) {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t row = 0; row < sequences.rows; ++row)
            sum_row(logp + row * sequences.logp_row_stride, sequences.target + row * sequences.target_row_stride,
                    sequences.columns, sequences.ignore_index, sums + row, counts + row);
    };
    if (sequences.logp.is_float32)
        sum_rows(static_cast<const float*>(sequences.logp.data));
    else
        sum_rows(static_cast<const double*>(sequences.logp.data));
}

void label_statistics(Labels labels, int64_t* slot, double* values) {
    std::vector<int64_t> order(labels.responses), start;
    const int64_t* group = labels.group;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return group[i] < group[j]; });
    for (int64_t i = 0; i < labels.responses; ++i)
        if (i == 0 || group[order[i]] != group[order[i - 1]]) start.push_back(i);
    labels.groups = static_cast<int64_t>(start.size());
    start.push_back(labels.responses);
    labels.order = order.data();
    labels.start = start.data();

    std::vector<double> memory(Scratch::DOUBLES_PER_RESPONSE * labels.responses);
    const Scratch scratch = Scratch::of(memory.data(), labels.responses);
    const Results out = Results::of(slot, values, labels.responses, labels.objectives);
    const OneThread team;
    weigh(team, labels, scratch, out);
    for (int64_t k = 0; k < labels.objectives; ++k) estimate(team, labels, k, scratch, out);
}

}  // namespace mopo
