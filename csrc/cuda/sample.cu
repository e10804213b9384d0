// Sampling: a block reads a row of logits once, in the order of its columns, and appends the row's entries.
//
//     t = p / floor where p = exp(z - lse) < floor, else 0;  an entry where the running sum of t passes a whole number,
//     where p >= floor, and at the target
//
// Running sums are integers, so that no rounding can lose a step between two threads. In a step each warp has columns of
// its own side by side, and a warp without an entry, as most are, is reduced to its sum; others are scanned.
//
// Products of samples: weighted sums of rows, a block for each list and part of the columns.
#include "sample.h"

#include "launch.cuh"
#include "logits.cuh"
#include "team.cuh"

namespace mopo {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
template <class T>
constexpr int VECTORS = sizeof(T) == 2 ? 2 : 4;  // that a thread has in flight: 16 elements or less, or registers spill

constexpr int ONE_BITS = 40;  // a whole number of the running sum in multiples of 2^-40, the contract's GRID
constexpr double ONE = static_cast<double>(int64_t{1} << ONE_BITS);
constexpr int FLAG_BITS = 56;  // above the sum of a block's columns, for how many threads are sure of an entry

// ------------------------------------------------------------------------------------------------------------- warps

__device__ int lane() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ int warp() { return static_cast<int>(threadIdx.x) / WARP; }

__device__ int64_t sum_of_warp(int64_t x) {
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// The sum over the lanes up to this one; the last lane's is the warp's.
__device__ int64_t scan_of_warp(int64_t x) {
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const int64_t below = __shfl_up_sync(ALL_LANES, x, lanes);
        if (lane() >= lanes) x += below;
    }
    return x;
}

__device__ int64_t of_last_lane(int64_t x) { return __shfl_sync(ALL_LANES, x, WARP - 1); }

// ------------------------------------------------------------------------------------------------------------ sample

__device__ int64_t nearest(float x) { return __float2ll_rn(x); }
__device__ int64_t nearest(double x) { return __double2ll_rn(x); }

// Which of a thread's columns have an entry, and which of those by a step: a bit each.
struct Found {
    unsigned entries = 0, steps = 0;
};

// Columns of a row fit 32 bits, as those of the entries do.
template <class T>
struct RowSampler {
    using A = Wide<T>;
    const Tile& tile;
    const Samples& samples;
    const T* logits;
    LogitTransform<A> transform;
    Shift<A> lse;
    A floor, inverse, slope;
    int target;  // of the tile; -1: elsewhere
    int count;  // alike in all threads, as the running sum is
    int64_t running;

    __device__ RowSampler(const Tile& tile, const Transform& options, const Sampling& sampling, const Samples& samples)
        : tile(tile),
          samples(samples),
          logits(static_cast<const T*>(tile.data) + row() * tile.row_stride),
          transform(tile.bias, options),
          lse(sampling.lse[row()]),
          floor(static_cast<A>(sampling.floor)),
          inverse(1 / floor),
          slope(static_cast<A>(options.inner * (options.softcap ? options.outer : 1))),
          count(samples.counts[row()]),
          running(static_cast<int64_t>(sampling.running[row()] * ONE)) {
        const int64_t column = tile.target[row()] - tile.first_column;
        target = 0 <= column && column < tile.columns ? static_cast<int>(column) : -1;
    }

    __device__ static int64_t row() { return blockIdx.x; }
    __device__ A probability(A z) const { return exponential(lse.of(z)); }
    __device__ int64_t units(A p) const { return p < floor ? nearest(p * inverse * static_cast<A>(ONE)) : 0; }
    __device__ static bool differ(int64_t x, int64_t y) { return x >> ONE_BITS != y >> ONE_BITS; }

    // Appends the entries of columns of which this thread has M times N side by side, from `column` on and `apart`
    // columns from each other; none at or beyond `end`, whose p is 0. Warps and, within one, the M vectors of all lanes
    // follow each other.
    template <int M, int N>
    __device__ void add(const A (&p)[M][N], int column, int apart, int end) {
        static_assert(M * N <= 32 && M <= 4, "bits of an integer; counts of 16 bits");
        __shared__ int64_t sum_of[WARPS];
        __shared__ int entries_of[WARPS];
        int64_t sum = 0;
        bool is_sure = false;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            is_sure |= is_target(column + m * apart, N, end);
#pragma unroll
            for (A x : p[m]) {
                sum += units(x);
                is_sure |= x >= floor;
            }
        }
        const int64_t of_warp = sum_of_warp(sum | static_cast<int64_t>(is_sure) << FLAG_BITS);
        if (lane() == 0) sum_of[warp()] = of_warp;
        __syncthreads();
        int64_t before = running;
        for (int w = 0; w < WARPS; ++w) {
            const int64_t other = sum_of[w] & ((int64_t{1} << FLAG_BITS) - 1);
            if (w < warp()) before += other;
            running += other;
        }
        Found found;
        int64_t place = 0, all = 0;  // 16 bits for each m: entries of lanes before this one, and of all
        if (of_warp >> FLAG_BITS || differ(before, before + of_warp)) {
            found = find(p, before, column, apart, end);
            int64_t counts = 0;
#pragma unroll
            for (int m = 0; m < M; ++m) counts |= static_cast<int64_t>(__popc(bits<N>(found.entries, m))) << 16 * m;
            place = scan_of_warp(counts);
            all = of_last_lane(place);
            place -= counts;
        }
        int entries = 0;
        for (int m = 0; m < M; ++m) entries += static_cast<int>(all >> 16 * m & 0xffff);
        if (lane() == 0) entries_of[warp()] = entries;
        __syncthreads();
        int position = count;
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp()) position += entries_of[w];
            count += entries_of[w];
        }
        for (int m = 0; m < M; ++m) {
            int to = position + static_cast<int>(place >> 16 * m & 0xffff);
            for (unsigned rest = bits<N>(found.entries, m); rest; rest &= rest - 1) {
                const int n = __ffs(static_cast<int>(rest)) - 1;
                append(to++, column + m * apart + n, found.steps >> (m * N + n) & 1);
            }
            position += static_cast<int>(all >> 16 * m & 0xffff);
        }
    }

    // The columns of this thread with an entry, where the warp's first has `before` in front of it.
    template <int M, int N>
    __device__ Found find(const A (&p)[M][N], int64_t before, int column, int apart, int end) const {
        Found found;
#pragma unroll
        for (int m = 0; m < M; ++m) {
            int64_t sum = 0;
#pragma unroll
            for (A x : p[m]) sum += units(x);
            const int64_t scanned = scan_of_warp(sum);
            int64_t here = before + scanned - sum;
            before += of_last_lane(scanned);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int64_t next = here + units(p[m][n]);
                const bool is_step = differ(here, next);
                const bool is_entry = is_step || p[m][n] >= floor || is_target(column + m * apart + n, 1, end);
                found.steps |= static_cast<unsigned>(is_step) << (m * N + n);
                found.entries |= static_cast<unsigned>(is_entry) << (m * N + n);
                here = next;
            }
        }
        return found;
    }

    __device__ bool is_target(int column, int size, int end) const {
        return column <= target && target < column + size && target < end;
    }

    template <int N>
    __device__ static unsigned bits(unsigned of_all, int m) {
        return of_all >> m * N & ((1ull << N) - 1);
    }

    // p and dz/dlogit once more, from the logit: entries are few, and registers too.
    __device__ void append(int place, int column, bool is_step) const {
        if (place >= samples.capacity) return;
        A u[1] = {widened(logits[column])};
        transform.scale(u, column);
        A z = u[0], bend = 1;
        if (transform.softcap) {
            const A tanh = hyperbolic_tangent(u[0]);
            z = transform.capped(u[0], tanh);
            bend = 1 - tanh * tanh;
        }
        const A p = probability(z), q = p >= floor ? p : is_step ? floor : 0;
        const int64_t to = row() * samples.capacity + place;
        samples.columns[to] = static_cast<int32_t>(tile.first_column) + column;
        static_cast<A*>(samples.values)[to] = q * (slope * bend);
    }

    // Columns that are no whole vector, fewer than a warp has lanes.
    __device__ void add_edge(int first, int last) {
        const int column = first + static_cast<int>(threadIdx.x);
        A p[1][1] = {{0}};
        if (column < last) p[0][0] = probability(transform.z(widened(logits[column]), column));
        add(p, column, 0, last);
    }
};

template <class T>
__global__ void __launch_bounds__(THREADS, 2)  // left alone, ptxas aims at 64 registers and spills
    sample_kernel(Tile tile, Transform options, Sampling sampling, Samples samples) {
    using A = Wide<T>;
    constexpr int WIDTH = Vector<T>::WIDTH, OWN = VECTORS<T>;
    const int64_t row = blockIdx.x;
    if (tile.target[row] < 0) return;
    RowSampler<T> sampler(tile, options, sampling, samples);
    const T* logits = sampler.logits;
    const Row<T> layout(logits, tile.columns);
    const int head = static_cast<int>(layout.head), columns = static_cast<int>(tile.columns);
    const int vectors = static_cast<int>(layout.vectors), end = head + vectors * WIDTH;

    if (head > 0) sampler.add_edge(0, head);
    for (int first = 0; first < vectors; first += THREADS * OWN) {
        const int own = first + warp() * WARP * OWN + lane();
        Vector<T> x[OWN];
        A p[OWN][WIDTH];
#pragma unroll
        for (int v = 0; v < OWN; ++v) {
            const int vector = own + v * WARP;
            if (vector < vectors) x[v] = load(logits + head + vector * WIDTH);
        }
#pragma unroll
        for (int v = 0; v < OWN; ++v) {
            const int vector = own + v * WARP;
            if (vector < vectors) {
                for (int i = 0; i < WIDTH; ++i) p[v][i] = widened(x[v].at[i]);
                sampler.transform.apply(p[v], head + vector * WIDTH);
                for (A& z : p[v]) z = sampler.probability(z);
            } else {
                for (A& missing : p[v]) missing = 0;
            }
        }
        sampler.add(p, head + own * WIDTH, WARP * WIDTH, end);
    }
    if (end < columns) sampler.add_edge(end, columns);
    if (threadIdx.x > 0) return;
    sampling.running[row] = static_cast<double>(sampler.running) / ONE;
    samples.counts[row] = static_cast<int32_t>(smaller(sampler.count, samples.capacity));
}

// ---------------------------------------------------------------------------------------------------------- products

constexpr int SUM_THREADS = 128;
constexpr int ENTRIES = 4;  // whose rows a thread has in flight

template <class T>
__device__ Vector<T> load_part(const T* address, int64_t size) {
    constexpr int WIDTH = Vector<T>::WIDTH;
    if (size >= WIDTH && reinterpret_cast<uintptr_t>(address) % 16 == 0) return load(address);
    Vector<T> x{};
    for (int i = 0; i < WIDTH; ++i)
        if (i < size) x.at[i] = address[i];
    return x;
}

template <class T>
__device__ void store_part(T* address, const Vector<T>& x, int64_t size) {
    if (size >= Vector<T>::WIDTH) return store(address, x);
    for (int i = 0; i < Vector<T>::WIDTH; ++i)
        if (i < size) address[i] = x.at[i];
}

template <class T, class Out>
__global__ void __launch_bounds__(SUM_THREADS) sum_rows_kernel(Lists lists, Matrix matrix, Matrix out, int64_t parts) {
    using A = Wide<T>;
    constexpr int WIDTH = Vector<T>::WIDTH;
    const int64_t list = blockIdx.x / parts, part = blockIdx.x % parts;
    const int64_t column = (part * SUM_THREADS + threadIdx.x) * WIDTH, size = matrix.columns - column;
    if (size <= 0) return;
    const T* columns = static_cast<const T*>(matrix.data) + column;
    const A* value = static_cast<const A*>(lists.value);
    const int64_t last = lists.stop[list];
    A total[WIDTH] = {};
    for (int64_t first = lists.start[list]; first < last; first += ENTRIES) {
        Vector<T> x[ENTRIES];
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e)
            if (first + e < last) x[e] = load_part(columns + lists.source_row[first + e] * matrix.row_stride, size);
#pragma unroll
        for (int e = 0; e < ENTRIES; ++e) {
            if (first + e >= last) continue;
            for (int i = 0; i < WIDTH; ++i) total[i] += value[first + e] * widened(x[e].at[i]);
        }
    }
    Out* sums = static_cast<Out*>(out.data) + list * out.row_stride + column;
#pragma unroll
    for (int first = 0; first < WIDTH; first += Vector<Out>::WIDTH) {
        Vector<Out> sum;
        for (int i = 0; i < Vector<Out>::WIDTH; ++i) sum.at[i] = narrowed<Out>(total[first + i]);
        store_part(sums + first, sum, size - first);
    }
}

}  // namespace

void fold_sample(const Tile& tile, const Transform& transform, const Sampling& sampling, const Samples& samples,
                 cudaStream_t stream) {
    if (tile.rows == 0 || tile.columns == 0) return;
    by_dtype(tile.dtype, [&](auto element) {
        launch(sample_kernel<decltype(element)>, tile.rows, THREADS, stream, tile, transform, sampling, samples);
    });
}

void sum_rows(const Lists& lists, const Matrix& matrix, const Matrix& out, cudaStream_t stream) {
    if (out.rows == 0 || out.columns == 0) return;
    by_dtype(matrix.dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t parts = ceil_div(out.columns, SUM_THREADS * Vector<T>::WIDTH);
        const auto kernel = out.dtype == matrix.dtype ? sum_rows_kernel<T, T> : sum_rows_kernel<T, Wide<T>>;
        launch(kernel, out.rows * parts, SUM_THREADS, stream, lists, matrix, out, parts);
    });
}

}  // namespace mopo
