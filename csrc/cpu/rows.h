// Row kernels, written once over a vector type V and the tile's element type T. Each instruction set compiles this file
// with its own flags, so everything here has internal linkage: the linker must never share code between sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fold.h"
#include "vec_portable.h"

namespace mopo {
namespace {

constexpr int64_t CHUNK = 1024;  // columns whose z wait in the first-level cache between the maximum and the exp

template <class V>
struct LogitTransform {
    using scalar = typename V::scalar;
    using reg = typename V::reg;
    const scalar* bias;
    scalar inner, outer;
    bool softcap;

    LogitTransform(const void* bias, const Transform& t)
        : bias(static_cast<const scalar*>(bias)),
          inner(static_cast<scalar>(t.inner)),
          outer(static_cast<scalar>(t.outer)),
          softcap(t.softcap) {}

    // inner * (logit + bias), the argument of tanh where there is a softcap; `column` is where x came from.
    reg scaled(reg x, int64_t column) const { return scaled_by(x, bias ? V::load(bias + column) : V::set(0)); }
    reg scaled(reg x, int64_t column, int count) const {
        return scaled_by(x, bias ? V::load(bias + column, count, 0) : V::set(0));
    }
    reg z(reg scaled) const { return softcap ? capped(scaled, V::tanh(scaled)) : scaled; }
    reg capped(reg scaled, reg tanh) const {
        const auto infinity = V::set(std::numeric_limits<scalar>::infinity());
        return V::select_less(V::abs(scaled), infinity, V::mul(V::set(outer), tanh), scaled);
    }

private:
    reg scaled_by(reg x, reg offset) const { return V::mul(V::set(inner), V::add(x, offset)); }
};

// z of `count` <= CHUNK columns into `z`, filled up to whole vectors with -inf; returns the largest.
template <class V, class T>
inline typename V::scalar transform_chunk(const T* x, int64_t first, int count, const LogitTransform<V>& transform,
                                          typename V::scalar* z) {
    const auto lowest = V::set(-std::numeric_limits<typename V::scalar>::infinity());
    auto largest = lowest;
    int i = 0;
    for (; i + V::width <= count; i += V::width) {
        const auto y = transform.z(transform.scaled(V::load(x + first + i), first + i));
        V::store(z + i, y);
        largest = V::max(largest, y);
    }
    if (i < count) {
        V::store(z + i, lowest);
        V::store(z + i, transform.z(transform.scaled(V::load(x + first + i, count - i, 0), first + i, count - i)),
                 count - i);
        largest = V::max(largest, V::load(z + i));
    }
    return V::max(largest);
}

constexpr int NOTHING = -1000;  // exp of it is 0, and so is its product with it

template <class V, class T, bool WEIGHTED>
void statistics_row(const void* row, int64_t columns, const void* bias, const Transform& t, const Statistics& of_row) {
    using scalar = typename V::scalar;
    const LogitTransform<V> transform(bias, t);
    const double lowest = -std::numeric_limits<double>::infinity();
    double* const maximum = of_row.maximum;
    double* const total = of_row.total;
    alignas(64) scalar z[CHUNK];
    for (int64_t first = 0; first < columns; first += CHUNK) {
        const int count = static_cast<int>(columns - first < CHUNK ? columns - first : CHUNK);
        const double largest = transform_chunk<V>(static_cast<const T*>(row), first, count, transform, z);
        if (largest > *maximum) {
            if (*total > 0) {
                const double shrunk = PortableDouble::exp(*maximum - largest);
                if constexpr (WEIGHTED) *of_row.weighted = (*of_row.weighted + *total * (*maximum - largest)) * shrunk;
                *total *= shrunk;
            }
            *maximum = largest;
        }
        // Where all are -inf so far, any finite shift gives the sum 0, and lets NaN through.
        const auto shift = V::set(*maximum == lowest ? scalar(0) : static_cast<scalar>(*maximum));
        auto sum = V::set(0), weighted = V::set(0);
        for (int i = 0; i < count; i += V::width) {
            const auto below = V::sub(V::load(z + i), shift), exponential = V::exp(below);
            sum = V::add(sum, exponential);
            if constexpr (WEIGHTED) weighted = V::add(weighted, V::mul(exponential, V::max(V::set(NOTHING), below)));
        }
        *total += V::sum(sum);
        if constexpr (WEIGHTED) *of_row.weighted += V::sum(weighted);
    }
}

template <class V, class T>
double value_of(const void* logit, const void* bias, const Transform& t) {
    alignas(64) typename V::scalar z[V::width];
    return transform_chunk<V>(static_cast<const T*>(logit), 0, 1, LogitTransform<V>(bias, t), z);
}

// lse in two parts: z - high is exact where z is near lse, so p does not feel the rounding of a large lse.
template <class V>
struct Shift {
    typename V::reg high, low;
    explicit Shift(double lse)
        : high(V::set(static_cast<typename V::scalar>(lse))),
          low(V::set(static_cast<typename V::scalar>(lse - static_cast<typename V::scalar>(lse)))) {}
};

// factor * bend * f(p) of one vector, with p = exp(z - lse) and bend = 1 - tanh^2 under a softcap, else 1.
template <class V, class F>
inline typename V::reg gradient(typename V::reg scaled, const LogitTransform<V>& transform, typename V::reg factor,
                                const Shift<V>& lse, F f) {
    auto slope = factor;
    auto z = scaled;
    if (transform.softcap) {
        const auto tanh = V::tanh(scaled);
        z = transform.capped(scaled, tanh);
        slope = V::mul(factor, V::sub(V::set(1), V::mul(tanh, tanh)));
    }
    return V::mul(slope, f(V::exp(V::sub(V::sub(z, lse.high), lse.low))));
}

template <class V, class T>
void gradient_row(const void* row, int64_t columns, const void* bias, const Transform& t, const RowGradient& of_row) {
    using scalar = typename V::scalar;
    const auto* x = static_cast<const T*>(row);
    auto* y = static_cast<T*>(of_row.out);
    const LogitTransform<V> transform(bias, t);
    const auto factor = [&](double coefficient) {
        return V::set(static_cast<scalar>(coefficient * t.inner * (t.softcap ? t.outer : 1.0)));
    };
    const Shift<V> shift(of_row.lse);
    const auto p = [](auto probability) { return probability; };
    const auto not_p = [](auto probability) { return V::sub(V::set(1), probability); };
    const int64_t target = of_row.target;
    const bool has_target = target >= 0 && target < columns;
    auto at_target = V::set(0);
    if (has_target) {  // before x is overwritten
        const auto scaled = transform.scaled(V::load(x + target, 1, 0), target, 1);
        at_target = gradient(scaled, transform, factor(of_row.coefficient), shift, not_p);
        if (of_row.lse_coefficient != 0)
            at_target = V::add(at_target, gradient(scaled, transform, factor(of_row.lse_coefficient), shift, p));
    }
    int64_t i = 0;
    if (of_row.coefficient == 0 && of_row.lse_coefficient == 0) {
        const auto zero = V::set(0);
        for (; i + V::width <= columns; i += V::width) V::store(y + i, zero);
        if (i < columns) V::store(y + i, zero, static_cast<int>(columns - i));
        return;
    }
    const auto others = factor(of_row.lse_coefficient - of_row.coefficient);
    for (; i + V::width <= columns; i += V::width)
        V::store(y + i, gradient(transform.scaled(V::load(x + i), i), transform, others, shift, p));
    if (i < columns) {
        const int count = static_cast<int>(columns - i);
        V::store(y + i, gradient(transform.scaled(V::load(x + i, count, 0), i, count), transform, others, shift, p),
                 count);
    }
    if (has_target) V::store(y + target, at_target, 1);
}

constexpr int PIECE = 4;  // vectors whose entries are looked for together: most pieces have none

// One running sum decides for all entries that are smaller than the floor: q is the floor where the sum passes a whole
// number, else 0. A piece in which it passes none is done with when its sum is known.
template <class V, class T>
void sample_row(const void* row, int64_t columns, const void* bias, const Transform& t, const RowSampling& of_row) {
    using scalar = typename V::scalar;
    constexpr int SIZE = PIECE * V::width;
    static_assert(CHUNK % SIZE == 0, "pieces fill a chunk");
    const auto* x = static_cast<const T*>(row);
    const LogitTransform<V> transform(bias, t);
    const Shift<V> shift(of_row.lse);
    const scalar floor = static_cast<scalar>(of_row.floor);
    const auto floors = V::set(floor), inverse = V::set(scalar(1) / floor);
    double running = *of_row.running, next = std::floor(running) + 1;
    int64_t count = *of_row.count;
    alignas(64) scalar probability[CHUNK];

    // t on the grid, and `exact` in the place of an entry >= floor.
    const auto steps_of = [&](const scalar* p, scalar exact) {
        const auto of_vector = V::load(p);
        return V::on_grid(V::select_less(of_vector, floors, V::mul(of_vector, inverse), V::set(exact)));
    };
    const auto append = [&](int64_t column, scalar q) {
        if (count == of_row.capacity) return;
        const auto one = [](auto) { return V::set(1); };
        const auto scaled = transform.scaled(V::load(x + column, 1, 0), column, 1);
        alignas(64) scalar slope[V::width];
        V::store(slope, gradient(scaled, transform, V::set(static_cast<scalar>(t.inner * t.outer)), shift, one));
        of_row.columns[count] = static_cast<int32_t>(of_row.first_column + column);
        static_cast<scalar*>(of_row.values)[count++] = slope[0] * q;
    };
    const auto append_piece = [&](const scalar* p, int64_t first, int size) {
        alignas(64) double steps[SIZE];
        for (int i = 0; i < size; i += V::width) V::store(steps + i, steps_of(p + i, 0));
        for (int i = 0; i < size; ++i) {
            running += steps[i];
            const bool is_exact = p[i] >= floor, is_step = running >= next;
            if (is_step) next += 1;
            if (is_step || is_exact || first + i == of_row.target)
                append(first + i, is_exact ? p[i] : is_step ? floor : scalar(0));
        }
    };
    for (int64_t first = 0; first < columns; first += CHUNK) {
        const int chunk = static_cast<int>(columns - first < CHUNK ? columns - first : CHUNK);
        transform_chunk<V>(x, first, chunk, transform, probability);
        for (int i = 0; i < chunk; i += V::width) {  // alone, so that no vector's exp waits behind another's sum
            const auto z = V::load(probability + i);
            V::store(probability + i, V::exp(V::sub(V::sub(z, shift.high), shift.low)));
        }
        for (int begin = 0; begin < chunk; begin += SIZE) {
            const int size = chunk - begin < SIZE ? chunk - begin : SIZE;
            const scalar* p = probability + begin;
            auto sum = V::on_grid(V::set(0));
            // An entry >= floor counts for so much that the sum passes a whole number.
            for (int i = 0; i < size; i += V::width) sum = V::add(sum, steps_of(p + i, 1 << 20));
            const double after = running + V::sum(sum);
            const int64_t target = of_row.target - first - begin;
            if (after < next && (target < 0 || target >= size))
                running = after;
            else
                append_piece(p, first + begin, size);
        }
    }
    *of_row.running = running;
    *of_row.count = static_cast<int32_t>(count);
}

template <class V, class T>
void sum_of_rows(const RowSum& sum) {
    using scalar = typename V::scalar;
    const Matrix& matrix = *sum.matrix;
    const int64_t columns = matrix.columns, whole = columns / V::width * V::width;
    const int rest = static_cast<int>(columns - whole);
    if (sum.count == 0) {  // as most columns of a large vocabulary
        std::memset(sum.out, 0, columns * (sum.total ? sizeof(T) : sizeof(scalar)));
        return;
    }
    auto* total = static_cast<scalar*>(sum.total ? sum.total : sum.out);
    std::memset(total, 0, columns * sizeof(scalar));
    for (int64_t j = 0; j < sum.count; ++j) {
        const auto row_at = [&](int64_t entry) {
            return static_cast<const T*>(matrix.data) + sum.rows[entry] * matrix.row_stride;
        };
        const T* row = row_at(j);
        const T* next = row_at(j + 1 < sum.count ? j + 1 : j);
        const auto value = V::set(static_cast<const scalar*>(sum.values)[j]);
        for (int64_t i = 0; i < whole; i += V::width) {
            __builtin_prefetch(next + i);
            V::store(total + i, V::fma(value, V::load(row + i), V::load(total + i)));
        }
        if (rest)
            V::store(total + whole, V::fma(value, V::load(row + whole, rest, 0), V::load(total + whole, rest, 0)), rest);
    }
    if (!sum.total) return;
    T* out = static_cast<T*>(sum.out);
    for (int64_t i = 0; i < whole; i += V::width) V::store(out + i, V::load(total + i));
    if (rest) V::store(out + whole, V::load(total + whole, rest, 0), rest);
}

template <class V, typename V::reg (*f)(typename V::reg)>
void map_row(const float* x, float* y, int64_t size) {
    int64_t i = 0;
    for (; i + V::width <= size; i += V::width) V::store(y + i, f(V::load(x + i)));
    if (i < size) {
        const int count = static_cast<int>(size - i);
        V::store(y + i, f(V::load(x + i, count, 0)), count);
    }
}

// The table of one instruction set; float64 tiles always take the portable kernels.
template <class V, class D>
constexpr RowKernels row_kernels() {
    return {
        {{statistics_row<V, float, false>, statistics_row<V, bfloat16, false>, statistics_row<V, float16, false>,
          statistics_row<D, double, false>},
         {statistics_row<V, float, true>, statistics_row<V, bfloat16, true>, statistics_row<V, float16, true>,
          statistics_row<D, double, true>}},
        {gradient_row<V, float>, gradient_row<V, bfloat16>, gradient_row<V, float16>, gradient_row<D, double>},
        {sample_row<V, float>, sample_row<V, bfloat16>, sample_row<V, float16>, sample_row<D, double>},
        {sum_of_rows<V, float>, sum_of_rows<V, bfloat16>, sum_of_rows<V, float16>, sum_of_rows<D, double>},
        {value_of<V, float>, value_of<V, bfloat16>, value_of<V, float16>, value_of<D, double>},
        map_row<V, V::exp>,
        map_row<V, V::tanh>,
    };
}

}  // namespace
}  // namespace mopo
