// What labels and multipliers alone say of a batch: target weights and estimates, in float64.
//
// The formulas stand in mopo_kernels/backends/batch.py. They are written once, for a Team of threads that work on one
// batch together: a plain loop on the CPU (csrc/cpu/batch.cpp), a thread block on the GPU (csrc/cuda). A Team has
//
//     for_each(n, f)          f(i) for every i < n, by any thread and in any order
//     sum(n, total, f)        total[0 .. N) = the sum over i < n of what f(i, total) adds; the order depends on n only
//     min(n, f), max(n, f)    of f(i) over i < n; +inf, -inf for none
//     once(f)                 f() by one thread
//
// All threads of a team make these calls in the same order, get the same results, and see in the next call what was
// written in the one before. Groups come sorted: the responses of group g are order[start[g]] .. order[start[g + 1] - 1].
// The floor is reading B * K labels and writing 4 * B results; what takes time is the launch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MOPO_HOST_DEVICE __host__ __device__
#else
#define MOPO_HOST_DEVICE
#endif

namespace mopo {

// A contiguous float32 or float64 tensor, read as float64; without data where the argument is None.
struct Floats {
    const void* data;
    bool is_float32;

    MOPO_HOST_DEVICE bool given() const { return data != nullptr; }
    MOPO_HOST_DEVICE double operator[](int64_t i) const {
        return is_float32 ? static_cast<const float*>(data)[i] : static_cast<const double*>(data)[i];
    }
};

// The responses of one group.
struct Members {
    const int64_t* first;
    const int64_t* last;

    MOPO_HOST_DEVICE const int64_t* begin() const { return first; }
    MOPO_HOST_DEVICE const int64_t* end() const { return last; }
    MOPO_HOST_DEVICE double size() const { return static_cast<double>(last - first); }
};

struct Settings {
    double tau, eps;
    int64_t primary;
};

struct Labels {
    int64_t responses, objectives;
    Floats win_rate;  // [B, K]
    const int64_t* group;  // [B] any ids
    Floats multipliers;  // [K]
    Floats lag_log_ratio;  // [B] or none
    Settings settings;
    int64_t groups = 0;  // these three once the groups are sorted
    const int64_t* order = nullptr;  // [B]
    const int64_t* start = nullptr;  // [G + 1]

    MOPO_HOST_DEVICE Members members(int64_t group) const { return {order + start[group], order + start[group + 1]}; }
    MOPO_HOST_DEVICE double lag(int64_t i) const { return lag_log_ratio.given() ? lag_log_ratio[i] : 0; }
    MOPO_HOST_DEVICE double label(int64_t i, int64_t objective) const { return win_rate[i * objectives + objective]; }
};

// Where the results stand: the slots of the responses, and the layout of LabelValues in mopo_kernels/backends/batch.py.
struct Results {
    int64_t* slot;  // [B]
    double *valid, *num_groups, *ess, *kl;
    double *size, *score, *weights;  // [B]
    double *win_rates, *lower_bounds, *chi;  // [K]

    static MOPO_HOST_DEVICE Results of(int64_t* slot, double* buffer, int64_t responses, int64_t objectives) {
        double *size = buffer + 4, *score = size + responses, *weights = score + responses;
        double* win_rates = weights + responses;
        return {slot, buffer,  buffer + 1, buffer + 2,           buffer + 3,
                size, score,   weights,    win_rates,            win_rates + objectives,
                win_rates + 2 * objectives};
    }
};

// Working memory of a team, [B] each.
struct Scratch {
    static constexpr int64_t DOUBLES_PER_RESPONSE = 4;
    double *log_ref, *log_weight;
    double *values, *masses;  // a sample and its measure

    static MOPO_HOST_DEVICE Scratch of(double* memory, int64_t responses) {
        return {memory, memory + responses, memory + 2 * responses, memory + 3 * responses};
    }
};

constexpr double NEUTRAL = 0.5;  // what an unlabelled response counts in a group that is labelled for others
constexpr double CHI_TOLERANCE = 1e-10;  // of sqrt(eps), relative; the bound's own error is of second order in it
constexpr int MAX_ROOT_STEPS = 200;  // a dozen in practice; doubling and bisection alone need fewer than this

MOPO_HOST_DEVICE inline bool is_nan(double x) { return x != x; }
MOPO_HOST_DEVICE inline bool is_finite(double x) { return x - x == 0; }

// Sorts a batch by group with B^2 comparisons: for teams of many threads and batches of up to a few thousand responses.
// Returns the number of groups; `first` is working memory. All three arrays as in Batch: [B], [B], [G + 1].
template <class Team>
MOPO_HOST_DEVICE int64_t sort_by_scanning(Team& team, const int64_t* group, int64_t responses, int64_t* first,
                                          int64_t* order, int64_t* start) {
    team.for_each(responses, [&](int64_t i) {
        int64_t j = 0;
        while (group[j] != group[i]) ++j;
        first[i] = j;
    });
    team.for_each(responses, [&](int64_t i) {
        int64_t place = 0, slot = 0;
        for (int64_t j = 0; j < responses; ++j) {
            place += first[j] < first[i] || (first[j] == first[i] && j < i);
            slot += first[j] == j && j < first[i];
        }
        order[place] = i;
        if (first[i] == i) start[slot] = place;
    });
    double groups[1];
    team.sum(responses, groups, [&](int64_t i, double* total) { total[0] += first[i] == i; });
    const auto count = static_cast<int64_t>(groups[0]);
    team.once([&] { start[count] = responses; });
    return count;
}

// 1, or 0 where label_statistics would refuse a value.
template <class Team>
MOPO_HOST_DEVICE void check_values(Team& team, const Labels& labels, const Results& out) {
    const int64_t longest = labels.responses > labels.objectives ? labels.responses : labels.objectives;
    double wrong[1];
    team.sum(longest, wrong, [&](int64_t i, double* total) {
        if (i < labels.responses) {
            for (int64_t k = 0; k < labels.objectives; ++k)
                total[0] += labels.label(i, k) < 0 || labels.label(i, k) > 1;
            total[0] += !is_finite(labels.lag(i));
        }
        if (i < labels.groups) total[0] += labels.members(i).size() < 2;
        if (i < labels.objectives) total[0] += !(labels.multipliers[i] >= 0 && is_finite(labels.multipliers[i]));
        if (i == labels.settings.primary) total[0] += labels.multipliers[i] != 1;
    });
    team.once([&] {
        *out.valid = wrong[0] == 0;
        *out.num_groups = static_cast<double>(labels.groups);
    });
}

MOPO_HOST_DEVICE inline bool is_labelled(const Labels& labels, const Members& members, int64_t objective) {
    for (int64_t i : members)
        if (!is_nan(labels.label(i, objective))) return true;
    return false;
}

// v_ik in a group that objective k labels.
MOPO_HOST_DEVICE inline double value(const Labels& labels, int64_t i, int64_t objective) {
    const double label = labels.label(i, objective);
    return is_nan(label) ? NEUTRAL : label;
}

// out = log_softmax of x(i) over one group.
template <class F>
MOPO_HOST_DEVICE void log_softmax(const Members& members, F x, double* out) {
    double largest = -INFINITY, total = 0;
    for (int64_t i : members) largest = x(i) > largest ? x(i) : largest;
    for (int64_t i : members) total += std::exp(x(i) - largest);
    for (int64_t i : members) out[i] = x(i) - largest - std::log(total);
}

// Slots, scores, reference measure and weights.
template <class Team>
MOPO_HOST_DEVICE void target_policy(Team& team, const Labels& labels, const Scratch& scratch, const Results& out) {
    team.for_each(labels.groups, [&](int64_t group) {
        const Members members = labels.members(group);
        for (int64_t i : members) {
            out.slot[i] = group;
            out.size[i] = members.size();
            out.score[i] = 0;
        }
        for (int64_t k = 0; k < labels.objectives; ++k) {
            if (!is_labelled(labels, members, k)) continue;
            for (int64_t i : members) out.score[i] += labels.multipliers[k] * value(labels, i, k);
        }
        for (int64_t i : members) out.score[i] /= labels.settings.tau;
        log_softmax(members, [&](int64_t i) { return labels.lag(i); }, scratch.log_ref);
        log_softmax(members, [&](int64_t i) { return out.score[i] + labels.lag(i); }, scratch.log_weight);
        for (int64_t i : members) out.weights[i] = std::exp(scratch.log_weight[i]);
    });
}

// ESS and KL(w || r).
template <class Team>
MOPO_HOST_DEVICE void weight_statistics(Team& team, const Labels& labels, const Scratch& scratch, const Results& out) {
    double sums[3];
    team.sum(labels.responses, sums, [&](int64_t i, double* total) {
        const double weight = out.weights[i];
        total[0] += weight;
        total[1] += weight * weight;
        total[2] += weight * (scratch.log_weight[i] - scratch.log_ref[i]);
    });
    team.once([&] {
        *out.ess = sums[0] * sums[0] / sums[1];
        *out.kl = sums[2] / static_cast<double>(labels.groups);
    });
}

struct Bound {
    double lower_bound, chi;
};

// The smallest mean of values[n] over the KL ball of radius eps around masses[n] / sum(masses), and its temperature chi:
// inf at eps = 0, 0 where the ball reaches the smallest value. Overwrites the values.
//
// With t = scale / chi, KL grows from 0 to -log(mass of the smallest value), and sqrt(KL) is nearly linear in t at
// first: Newton on it, and doubling or bisection where a step leaves the bracket (robust.py has the same iteration).
template <class Team>
MOPO_HOST_DEVICE Bound robust_bound(Team& team, double* values, const double* masses, int64_t n, double eps) {
    double sums[3];
    if (eps == 0) {
        team.sum(n, sums, [&](int64_t i, double* total) {
            total[0] += masses[i];
            total[1] += masses[i] * values[i];
        });
        return {sums[1] / sums[0], INFINITY};
    }
    const double lowest = team.min(n, [&](int64_t i) { return masses[i] > 0 ? values[i] : INFINITY; });
    const double scale = team.max(n, [&](int64_t i) { return masses[i] > 0 ? values[i] - lowest : 0; });
    double* excess = values;
    team.for_each(n, [&](int64_t i) { excess[i] = masses[i] > 0 && scale > 0 ? (values[i] - lowest) / scale : 0; });

    team.sum(n, sums, [&](int64_t i, double* total) {
        total[0] += masses[i];
        total[1] += masses[i] * excess[i];
        if (excess[i] == 0) total[2] += masses[i];
    });
    const double mass = sums[0], mean = sums[1] / mass;
    if (scale == 0 || std::log(sums[2] / mass) >= -eps) return {lowest, 0};
    double variance[1];
    team.sum(n, variance, [&](int64_t i, double* total) {
        total[0] += masses[i] / mass * (excess[i] - mean) * (excess[i] - mean);
    });

    const double radius = std::sqrt(eps), tolerance = CHI_TOLERANCE * (radius > 1e-5 ? radius : 1e-5);
    double low = 0, high = INFINITY, t = std::sqrt(2 * eps / (variance[0] > 1e-30 ? variance[0] : 1e-30));
    for (int step = 1;; ++step) {
        team.sum(n, sums, [&](int64_t i, double* total) {
            const double tilted = masses[i] * std::exp(-t * excess[i]);
            total[0] += tilted;
            total[1] += tilted * excess[i];
            total[2] += tilted * excess[i] * excess[i];
        });
        const double log_mass = std::log(sums[0] / mass), tilted_mean = sums[1] / sums[0];
        const double kl = -t * tilted_mean - log_mass, root = std::sqrt(kl > 0 ? kl : 0), error = root - radius;
        (error < 0 ? low : high) = t;
        if (std::fabs(error) <= tolerance || high - low <= 1e-15 * low || step == MAX_ROOT_STEPS)
            return {lowest - scale / t * (log_mass + eps), scale / t};
        const double slope = t * (sums[2] / sums[0] - tilted_mean * tilted_mean) / (2 * root);
        const double newton = t - error / slope;
        t = low < newton && newton < high ? newton : high == INFINITY ? 2 * t : (low + high) / 2;
    }
}

// Win rate, lower bound and chi of one objective; NaN where the batch does not label it.
template <class Team>
MOPO_HOST_DEVICE void estimate(Team& team, const Labels& labels, int64_t objective, const Scratch& scratch,
                               const Results& out) {
    double sums[2];
    team.sum(labels.groups, sums, [&](int64_t group, double* total) {
        const Members members = labels.members(group);
        const bool labelled = is_labelled(labels, members, objective);
        total[1] += labelled;
        for (int64_t i : members) {
            const double v = labelled ? value(labels, i, objective) : 0;
            total[0] += out.weights[i] * v;
            scratch.values[i] = std::exp(scratch.log_weight[i] - scratch.log_ref[i]) * v;
            scratch.masses[i] = labelled ? std::exp(scratch.log_ref[i]) : 0;
        }
    });
    Bound bound{NAN, NAN};
    if (sums[1] > 0)
        bound = robust_bound(team, scratch.values, scratch.masses, labels.responses, labels.settings.eps);
    team.once([&] {
        out.win_rates[objective] = sums[0] / sums[1];
        out.lower_bounds[objective] = bound.lower_bound;
        out.chi[objective] = bound.chi;
    });
}

// All but the estimates, which may go to several teams afterwards, with values and masses of their own.
template <class Team>
MOPO_HOST_DEVICE void weigh(Team& team, const Labels& labels, const Scratch& scratch, const Results& out) {
    check_values(team, labels, out);
    target_policy(team, labels, scratch, out);
    weight_statistics(team, labels, scratch, out);
}

}  // namespace mopo
