// The fold kernels: each reads a row of logits once, in 16-byte vectors, and one row may be shared by several blocks.
//
//     statistics   a thread keeps the maximum of its z and the sum of exp(z - maximum), a block combines its threads',
//                  and where a row has several blocks a second kernel combines theirs
//     gradient     (coefficient * (onehot - p) + lse_coefficient * p) * dz/dlogit with p = exp(z - lse), elementwise
//
// What only some calls ask for, entropies and the gradient of lse, is in kernels of their own.
#include "fold.h"

#include <type_traits>

#include "launch.cuh"
#include "logits.cuh"
#include "team.cuh"

namespace mopo {
namespace {

constexpr int THREADS = 256;
constexpr int VECTORS = 4;  // that a thread has in flight: with three blocks a multiprocessor, 48 KB
constexpr int64_t STEP = THREADS * VECTORS;  // vectors that a block reads at a time
constexpr int64_t ENOUGH_BLOCKS = 4096;  // for the largest GPU to be busy to the end of its last wave

using Block = Team<THREADS>;

// ------------------------------------------------------------------------------------------------------------- rows

// How blocks share rows: `per_row` of them have a row, `vectors` each of its vectors, the first one its edges too.
struct Parts {
    int per_row;
    int64_t vectors;

    __device__ int64_t row() const { return blockIdx.x / per_row; }
    __device__ int index() const { return static_cast<int>(blockIdx.x % per_row); }
    __device__ bool has_edges() const { return index() == 0; }
    __device__ int64_t first() const { return index() * vectors; }
    __device__ int64_t last(int64_t row_vectors) const { return smaller(first() + vectors, row_vectors); }
};

// ------------------------------------------------------------------------------------------------------- statistics

__device__ float larger(float x, float y) { return fmaxf(x, y); }  // the other one where one is NaN
__device__ double larger(double x, double y) { return fmax(x, y); }

template <class A>
__device__ A finite_or_zero(A maximum) {  // any finite shift makes exp(-inf - shift) 0 and lets NaN through
    return maximum == -static_cast<A>(INFINITY) ? 0 : maximum;
}

template <class A>
__device__ A finite(A below) {  // exp(-1000) is 0, and so is its product with -1000
    return larger(below, -1000);
}

// The sum of exp(z - maximum) * (z - maximum), or nothing.
template <bool WEIGHTED>
struct Weighted {
    double weighted = 0;
};
template <>
struct Weighted<false> {};

// The maximum of some z and the sum of exp(z - maximum).
template <class A, bool WEIGHTED>
struct Running : Weighted<WEIGHTED> {
    A maximum = -INFINITY;
    double total = 0;

    // The weighted sum relative to a maximum that is larger by -below.
    __device__ double weighted_below(A below) const {
        return (this->weighted + total * finite(below)) * exponential(below);
    }

    __device__ void add(const Running& other) {
        const A largest = larger(maximum, other.maximum), shift = finite_or_zero(largest);
        if constexpr (WEIGHTED)
            this->weighted = weighted_below(maximum - shift) + other.weighted_below(other.maximum - shift);
        total = total * exponential(maximum - shift) + other.total * exponential(other.maximum - shift);
        maximum = largest;
    }

    static __device__ Running of(A z) {
        Running one;
        one.maximum = z;
        one.total = 1;
        return one;
    }

    template <int M, int N>
    __device__ void add(const A (&z)[M][N]) {
        A largest = maximum;
        for (const auto& vector : z)
            for (A x : vector) largest = larger(largest, x);
        const A shift = finite_or_zero(largest);
        A more = 0, more_weighted = 0;
#pragma unroll
        for (const auto& vector : z) {
            A part = 0, part_weighted = 0;
#pragma unroll
            for (A x : vector) {
                const A y = exponential(x - shift);
                part += y;
                if constexpr (WEIGHTED) part_weighted += y * finite(x - shift);
            }
            more += part;
            more_weighted += part_weighted;
        }
        if constexpr (WEIGHTED) this->weighted = weighted_below(maximum - shift) + more_weighted;
        total = total * exponential(maximum - shift) + more;
        maximum = largest;
    }

    // Those of all threads of a team.
    template <class Threads>
    __device__ Running combined() const {
        Running all;
        all.maximum = static_cast<A>(Threads::max(maximum));
        const A below = maximum - finite_or_zero(all.maximum);
        all.total = Threads::sum(total * exponential(below));
        if constexpr (WEIGHTED) all.weighted = Threads::sum(weighted_below(below));
        return all;
    }

    __device__ void fold_into(const Statistics& statistics, int64_t row) const {
        Running all;
        all.maximum = static_cast<A>(statistics.maximum[row]);
        all.total = statistics.total[row];
        if constexpr (WEIGHTED) all.weighted = statistics.weighted[row];
        all.add(*this);
        statistics.maximum[row] = all.maximum;
        statistics.total[row] = all.total;
        if constexpr (WEIGHTED) statistics.weighted[row] = all.weighted;
    }
};

// Blocks that a multiprocessor is to hold at once: left to ptxas, the weighted sum of bfloat16 takes 107 registers.
template <class T, bool WEIGHTED>
constexpr int BLOCKS_AT_ONCE = WEIGHTED && sizeof(Wide<T>) == sizeof(float) ? 3 : 0;

template <class T, bool WEIGHTED>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE<T, WEIGHTED>)
    statistics_kernel(Tile tile, Transform options, Statistics statistics, Running<Wide<T>, WEIGHTED>* of_parts,
                      Parts parts) {
    using A = Wide<T>;
    constexpr int WIDTH = Vector<T>::WIDTH;
    const int64_t row = parts.row();
    if (tile.target[row] < 0) return;
    const T* logits = static_cast<const T*>(tile.data) + row * tile.row_stride;
    const LogitTransform<A> transform(tile.bias, options);
    const Row<T> layout(logits, tile.columns);
    Running<A, WEIGHTED> running;

    const int64_t last = parts.last(layout.vectors);
    for (int64_t first = parts.first(); first < last; first += STEP) {
        Vector<T> x[VECTORS];
        A z[VECTORS][WIDTH];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t vector = first + v * THREADS + threadIdx.x;
            if (vector < last) x[v] = load(logits + layout.column(vector));
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t vector = first + v * THREADS + threadIdx.x;
            if (vector < last) {
                for (int i = 0; i < WIDTH; ++i) z[v][i] = widened(x[v].at[i]);
                transform.apply(z[v], layout.column(vector));
            } else {
                for (A& missing : z[v]) missing = -static_cast<A>(INFINITY);
            }
        }
        running.add(z);
    }
    if (parts.has_edges() && threadIdx.x < layout.edges()) {
        const int64_t column = layout.edge(threadIdx.x);
        running.add(Running<A, WEIGHTED>::of(transform.z(widened(logits[column]), column)));
    }

    const Running<A, WEIGHTED> all = running.template combined<Block>();
    if (threadIdx.x > 0) return;
    const int64_t target = tile.target[row] - tile.first_column;
    if (parts.index() == 0 && target >= 0 && target < tile.columns)
        statistics.chosen[row] = transform.z(widened(logits[target]), target);
    if (parts.per_row == 1)
        all.fold_into(statistics, row);
    else
        of_parts[blockIdx.x] = all;
}

template <class A, bool WEIGHTED>
__global__ void __launch_bounds__(WARP)
    combine_kernel(const int64_t* target, const Running<A, WEIGHTED>* of_parts, int parts, Statistics statistics) {
    const int64_t row = blockIdx.x;
    if (target[row] < 0) return;
    Running<A, WEIGHTED> running;
    for (int part = static_cast<int>(threadIdx.x); part < parts; part += WARP)
        running.add(of_parts[row * parts + part]);
    const Running<A, WEIGHTED> all = running.template combined<Team<WARP>>();
    if (threadIdx.x == 0) all.fold_into(statistics, row);
}

// --------------------------------------------------------------------------------------------------------- gradient

// (coefficient * (onehot - p) + lse_coefficient * p) * dz/dlogit of one logit; without OF_LSE, lse_coefficient is 0.
template <class A, bool OF_LSE>
struct Gradient {
    LogitTransform<A> transform;
    Shift<A> lse;
    A factor, lse_factor;

    __device__ Gradient(const void* bias, const Transform& options, double lse, double coefficient,
                        double lse_coefficient)
        : transform(bias, options),
          lse(lse),
          factor(static_cast<A>(coefficient * options.inner * (options.softcap ? options.outer : 1))),
          lse_factor(static_cast<A>(lse_coefficient * options.inner * (options.softcap ? options.outer : 1))) {}

    // logits of neighbouring columns ← their gradients; `target` counts from the first of them.
    template <int N>
    __device__ void apply(A (&x)[N], int64_t first_column, int64_t target) const {
        const int is_target = 0 <= target && target < N ? static_cast<int>(target) : -1;
        transform.scale(x, first_column);
        for (int i = 0; i < N; ++i) {
            A z = x[i], slope = factor, lse_slope = lse_factor;
            if (transform.softcap) {
                const A tanh = hyperbolic_tangent(z);
                z = transform.capped(z, tanh);
                slope *= 1 - tanh * tanh;
                if constexpr (OF_LSE) lse_slope *= 1 - tanh * tanh;
            }
            x[i] = slope * (static_cast<A>(i == is_target) - exponential(lse.of(z)));
            if constexpr (OF_LSE) x[i] += lse_slope * exponential(lse.of(z));
        }
    }
};

template <class T>
__device__ void fill_with_zero(T* out, int64_t columns, const Parts& parts) {
    const Row<T> layout(out, columns);
    const Vector<T> zero{};
    const int64_t last = parts.last(layout.vectors);
    for (int64_t vector = parts.first() + threadIdx.x; vector < last; vector += THREADS)
        store(out + layout.column(vector), zero);
    if (parts.has_edges() && threadIdx.x < layout.edges()) out[layout.edge(threadIdx.x)] = narrowed<T>(0);
}

// Left alone, ptxas aims at 64 registers for float64 and spills on sm_120.
template <class T, bool OF_LSE>
__global__ void __launch_bounds__(THREADS, OF_LSE && sizeof(T) == sizeof(double) ? 2 : 0)
    gradient_kernel(Tile tile, Transform options, GradientRows rows, Parts parts) {
    using A = Wide<T>;
    constexpr int WIDTH = Vector<T>::WIDTH;
    const int64_t row = parts.row();
    const T* logits = static_cast<const T*>(tile.data) + row * tile.row_stride;
    T* out = static_cast<T*>(rows.out) + row * rows.row_stride;
    double lse_coefficient = 0;
    if constexpr (OF_LSE) lse_coefficient = rows.lse_coefficient[row];
    if (rows.coefficient[row] == 0 && lse_coefficient == 0) return fill_with_zero(out, tile.columns, parts);
    const Gradient<A, OF_LSE> gradient(tile.bias, options, rows.lse[row], rows.coefficient[row], lse_coefficient);
    const int64_t target = tile.target[row] - tile.first_column;
    const Row<T> layout(logits, tile.columns);

    const int64_t last = parts.last(layout.vectors);
    for (int64_t first = parts.first(); first < last; first += STEP) {
        Vector<T> x[VECTORS];
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t vector = first + v * THREADS + threadIdx.x;
            if (vector < last) x[v] = load(logits + layout.column(vector));
        }
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
            const int64_t vector = first + v * THREADS + threadIdx.x;
            const int64_t column = layout.column(vector);
            if (vector >= last) continue;
            A y[WIDTH];
            for (int i = 0; i < WIDTH; ++i) y[i] = widened(x[v].at[i]);
            gradient.apply(y, column, target - column);
            for (int i = 0; i < WIDTH; ++i) x[v].at[i] = narrowed<T>(y[i]);
            store(out + column, x[v]);
        }
    }
    if (parts.has_edges() && threadIdx.x < layout.edges()) {
        const int64_t column = layout.edge(threadIdx.x);
        A y[1] = {widened(logits[column])};
        gradient.apply(y, column, target - column);
        out[column] = narrowed<T>(y[0]);
    }
}

// -------------------------------------------------------------------------------------------------------- launching

// Enough blocks for few long rows to fill the GPU, but none with less to read than one step. Shapes alone decide, so
// that every GPU sums in the same order.
Parts parts_of(const Tile& tile) {
    const int64_t vectors = ceil_div(tile.columns * element_size(tile.dtype), 16);
    const int64_t wanted = ceil_div(ENOUGH_BLOCKS, tile.rows), most = ceil_div(vectors, STEP);
    const int64_t per_row = wanted < most ? wanted : most;
    return {static_cast<int>(per_row), ceil_div(vectors, per_row)};
}

// f(T(), std::bool_constant<extra>()) of the element type.
template <class F>
void by_type(DType dtype, bool extra, F f) {
    by_dtype(dtype, [&](auto element) { return extra ? f(element, std::true_type()) : f(element, std::false_type()); });
}

}  // namespace

int64_t statistics_scratch(const Tile& tile) {
    static_assert(sizeof(Running<double, true>) == 3 * sizeof(double));  // the largest of them
    if (tile.rows == 0 || tile.columns == 0) return 0;
    const int per_row = parts_of(tile).per_row;
    return per_row == 1 ? 0 : 3 * tile.rows * per_row;
}

void fold_statistics(const Tile& tile, const Transform& transform, const Statistics& statistics, double* scratch,
                     cudaStream_t stream) {
    if (tile.rows == 0 || tile.columns == 0) return;
    const Parts parts = parts_of(tile);
    by_type(tile.dtype, statistics.weighted != nullptr, [&](auto element, auto extra) {
        using T = decltype(element);
        constexpr bool WEIGHTED = decltype(extra)::value;
        auto* of_parts = reinterpret_cast<Running<Wide<T>, WEIGHTED>*>(scratch);
        launch(statistics_kernel<T, WEIGHTED>, tile.rows * parts.per_row, THREADS, stream, tile, transform, statistics,
               of_parts, parts);
        if (parts.per_row > 1)
            launch(combine_kernel<Wide<T>, WEIGHTED>, tile.rows, WARP, stream, tile.target, of_parts, parts.per_row,
                   statistics);
    });
}

void fold_gradient(const Tile& tile, const Transform& transform, const GradientRows& gradient, cudaStream_t stream) {
    if (tile.rows == 0 || tile.columns == 0) return;
    const Parts parts = parts_of(tile);
    by_type(tile.dtype, gradient.lse_coefficient != nullptr, [&](auto element, auto extra) {
        launch(gradient_kernel<decltype(element), decltype(extra)::value>, tile.rows * parts.per_row, THREADS, stream,
               tile, transform, gradient, parts);
    });
}

}  // namespace mopo
