// Sampling: a block takes a row, in the order of its columns, and appends the row's entries.
//
//     t = p / floor where p = exp(z - lse) < floor, else 0;  an entry where the running sum of t passes a whole number,
//     where p >= floor, and at the target
//
// Running sums are integers, so that no rounding can lose a step between two threads. Warps first sum up the chunks of a
// stretch, each the logits that a warp has in flight, without waiting for one another: that is the pass over memory. What
// stands before a chunk then says whether it has an entry, and the few that have are read once more.
//
// Products of samples: weighted sums of rows, a block for each list and part of the columns.
#include "sample.h"

#include <algorithm>

#include "launch.cuh"
#include "logits.cuh"
#include "team.cuh"

namespace mopo {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int VECTORS = 4;  // that a lane has in flight; their columns fit the bits of an integer
constexpr int CHUNKS = THREADS;  // of a stretch: a thread for each

constexpr int ONE_BITS = 40;  // a whole number of the running sum in multiples of 2^-40, the contract's GRID
constexpr double ONE = static_cast<double>(int64_t{1} << ONE_BITS);
constexpr int ELSEWHERE = INT32_MIN;  // the target is in no column of this tile
constexpr int FLAG_BITS = 56;  // above the sum of a chunk, for how many lanes are sure of an entry

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

// The sum over the threads of the block before this one, and in `total` that over all.
__device__ int64_t sum_before(int64_t x, int64_t& total) {
    __shared__ int64_t of_warp[WARPS];
    const int64_t scanned = scan_of_warp(x);
    if (lane() == WARP - 1) of_warp[warp()] = scanned;
    __syncthreads();
    int64_t before = scanned - x;
    total = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp()) before += of_warp[w];
        total += of_warp[w];
    }
    __syncthreads();
    return before;
}

// ------------------------------------------------------------------------------------------------------------ sample

__device__ int64_t nearest(float x) { return __float2ll_rn(x); }
__device__ int64_t nearest(double x) { return __double2ll_rn(x); }
__device__ float larger(float x, float y) { return fmaxf(x, y); }
__device__ double larger(double x, double y) { return fmax(x, y); }

// What threads of a block know of the chunks of a stretch.
struct Stretch {
    int64_t sum[CHUNKS];  // of t; then of all before
    bool has_entries[CHUNKS];
    int entries[CHUNKS];  // how many; then the place of the first
    unsigned which[CHUNKS][WARP];  // of each lane's columns, a bit each, the first vector's lowest
    bool target_is_step;
};

// Columns of a row fit 32 bits, as those of the entries do.
template <class T, bool SOFTCAP>
struct RowSampler {
    using A = Wide<T>;
    static constexpr int WIDTH = Vector<T>::WIDTH, APART = WARP * WIDTH, CHUNK = VECTORS * APART;
    static_assert(VECTORS * WIDTH <= 32 && VECTORS <= 4, "bits of an integer; counts of 16 bits");
    const Tile& tile;
    const Samples& samples;
    const T* logits;
    LogitTransform<A> transform;
    Shift<A> lse;
    A floor, grids, slope;
    int columns, first, target;  // of the tile; `first` is that of whole vectors, maybe before 0
    int count;  // alike in all threads, as the running sum is
    int64_t running;

    __device__ RowSampler(const Tile& tile, const Transform& options, const Sampling& sampling, const Samples& samples)
        : tile(tile),
          samples(samples),
          logits(static_cast<const T*>(tile.data) + row() * tile.row_stride),
          transform(tile.bias, options),
          lse(sampling.lse[row()]),
          floor(static_cast<A>(sampling.floor)),
          grids(1 / floor * static_cast<A>(ONE)),
          slope(static_cast<A>(options.inner * (options.softcap ? options.outer : 1))),
          columns(static_cast<int>(tile.columns)),
          count(samples.counts[row()]),
          running(static_cast<int64_t>(sampling.running[row()] * ONE)) {
        transform.softcap = SOFTCAP;  // known to the compiler
        const int head = static_cast<int>(Row<T>(logits, tile.columns).head);
        first = head > 0 ? head - WIDTH : 0;
        const int64_t column = tile.target[row()] - tile.first_column;
        target = 0 <= column && column < tile.columns ? static_cast<int>(column) : ELSEWHERE;
    }

    __device__ static int64_t row() { return blockIdx.x; }
    __device__ A probability(A z) const { return exponential(lse.of(z)); }
    __device__ int64_t units(A p) const { return nearest(p < floor ? p * grids : 0); }  // without a branch
    __device__ static bool differ(int64_t x, int64_t y) { return x >> ONE_BITS != y >> ONE_BITS; }

    __device__ int chunks() const { return (columns - first + CHUNK - 1) / CHUNK; }
    // The first column of this lane's m-th vector of a chunk: vectors of all lanes follow each other, then the next m.
    __device__ int column_of(int chunk, int m) const { return first + chunk * CHUNK + m * APART + lane() * WIDTH; }
    __device__ bool is_whole(int column) const { return column >= 0 && column + WIDTH <= columns; }

    // f(m, p) of this lane's vectors of a chunk, p = 0 where there is no column.
    template <class F>
    __device__ void visit(int chunk, F f) const {
        const int begin = first + chunk * CHUNK;
        if (begin >= 0 && begin + CHUNK <= columns)
            visit<true>(chunk, f);
        else
            visit<false>(chunk, f);
    }

    template <bool WHOLE, class F>
    __device__ void visit(int chunk, F f) const {
        Vector<T> x[VECTORS];
#pragma unroll
        for (int m = 0; m < VECTORS; ++m) {
            const int column = column_of(chunk, m);
            if (WHOLE || is_whole(column)) {
                x[m] = load(logits + column);
            } else {
                for (int n = 0; n < WIDTH; ++n) x[m].at[n] = has(column + n) ? logits[column + n] : T();
            }
        }
#pragma unroll
        for (int m = 0; m < VECTORS; ++m) {
            const int column = column_of(chunk, m);
            A p[WIDTH];
            for (int n = 0; n < WIDTH; ++n) p[n] = widened(x[m].at[n]);
            if (transform.bias)
                for (int n = 0; n < WIDTH; ++n)
                    if (WHOLE || has(column + n)) p[n] += transform.bias[column + n];
            for (A& u : p) u *= transform.inner;
            transform.cap(p);
            for (A& z : p) z = probability(z);
            if (!WHOLE)
                for (int n = 0; n < WIDTH; ++n)
                    if (!has(column + n)) p[n] = 0;
            f(m, p);
        }
    }

    __device__ bool has(int column) const { return 0 <= column && column < columns; }

    // Appends the entries of chunks first_chunk ... of which there are `size` <= CHUNKS; chunk c is warp c % WARPS's.
    __device__ void add(int first_chunk, int size) {
        __shared__ Stretch stretch;
        for (int c = warp(); c < size; c += WARPS) add_up(stretch, c, first_chunk + c);
        __syncthreads();

        const int mine = static_cast<int>(threadIdx.x);
        const int64_t found = mine < size ? stretch.sum[mine] : 0, sum = found & ((int64_t{1} << FLAG_BITS) - 1);
        int64_t total;
        const int64_t before = running + sum_before(sum, total);
        running += total;
        stretch.sum[mine] = before;
        stretch.has_entries[mine] = found >> FLAG_BITS || differ(before, before + sum);
        stretch.entries[mine] = 0;
        __syncthreads();

        for (int c = warp(); c < size; c += WARPS)
            if (stretch.has_entries[c]) find(stretch, c, first_chunk + c);
        __syncthreads();

        const int place = count + static_cast<int>(sum_before(stretch.entries[mine], total));
        count += static_cast<int>(total);
        stretch.entries[mine] = place;
        __syncthreads();

        for (int c = warp(); c < size; c += WARPS)
            if (stretch.has_entries[c]) append_all(stretch, c, first_chunk + c);
    }

    __device__ void add_up(Stretch& stretch, int c, int chunk) const {
        int64_t sum = 0;
        A largest = 0;
        bool is_sure = false;
        visit(chunk, [&](int m, const A (&p)[WIDTH]) {
            is_sure |= is_target(column_of(chunk, m), WIDTH);
            for (A x : p) {
                sum += units(x);
                largest = larger(largest, x);
            }
        });
        is_sure |= largest >= floor;
        sum = sum_of_warp(sum | static_cast<int64_t>(is_sure) << FLAG_BITS);
        if (lane() == 0) stretch.sum[c] = sum;
    }

    __device__ void find(Stretch& stretch, int c, int chunk) const {
        int64_t before = stretch.sum[c];
        unsigned which = 0;
        visit(chunk, [&](int m, const A (&p)[WIDTH]) {
            int64_t sum = 0;
            for (A x : p) sum += units(x);
            const int64_t scanned = scan_of_warp(sum);
            int64_t here = before + scanned - sum;
            before += of_last_lane(scanned);
#pragma unroll
            for (int n = 0; n < WIDTH; ++n) {
                const int64_t next = here + units(p[n]);
                const bool at_target = is_target(column_of(chunk, m) + n, 1), is_step = differ(here, next);
                if (at_target) stretch.target_is_step = is_step;
                which |= static_cast<unsigned>(is_step || at_target || p[n] >= floor) << (m * WIDTH + n);
                here = next;
            }
        });
        stretch.which[c][lane()] = which;
        const int entries = static_cast<int>(sum_of_warp(__popc(which)));
        if (lane() == 0) stretch.entries[c] = entries;
    }

    // Entries of a lane's vectors stand behind those of earlier vectors, of whatever lane: 16 bits for the count of each.
    __device__ void append_all(const Stretch& stretch, int c, int chunk) const {
        const unsigned which = stretch.which[c][lane()];
        int64_t counts = 0;
#pragma unroll
        for (int m = 0; m < VECTORS; ++m) counts |= static_cast<int64_t>(__popc(bits(which, m))) << 16 * m;
        const int64_t scanned = scan_of_warp(counts), all = of_last_lane(scanned), before = scanned - counts;
        int place = stretch.entries[c];
        for (int m = 0; m < VECTORS; ++m) {
            int to = place + static_cast<int>(before >> 16 * m & 0xffff);
            for (unsigned rest = bits(which, m); rest; rest &= rest - 1) {
                const int column = column_of(chunk, m) + __ffs(static_cast<int>(rest)) - 1;
                append(to++, column, column != target || stretch.target_is_step);
            }
            place += static_cast<int>(all >> 16 * m & 0xffff);
        }
    }

    __device__ bool is_target(int column, int size) const { return column <= target && target < column + size; }
    __device__ static unsigned bits(unsigned of_all, int m) { return of_all >> m * WIDTH & ((1ull << WIDTH) - 1); }

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
};

template <class T, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS, 2)
    sample_kernel(Tile tile, Transform options, Sampling sampling, Samples samples) {
    const int64_t row = blockIdx.x;
    if (tile.target[row] < 0) return;
    RowSampler<T, SOFTCAP> sampler(tile, options, sampling, samples);
    const int chunks = sampler.chunks();
    for (int chunk = 0; chunk < chunks; chunk += CHUNKS)
        sampler.add(chunk, chunks - chunk < CHUNKS ? chunks - chunk : CHUNKS);
    if (threadIdx.x > 0) return;
    sampling.running[row] = static_cast<double>(sampler.running) / ONE;
    samples.counts[row] = static_cast<int32_t>(smaller(sampler.count, samples.capacity));
}

// ---------------------------------------------------------------------------------------------------------- products

constexpr int SUM_THREADS = 128;
constexpr int ENTRIES = 4;  // whose rows a thread has in flight
constexpr int LISTS = 8;  // that a block sums up at most: short ones are over before their first row is there
constexpr int64_t BLOCKS = 16384;  // more than a GPU has at a time; lists are put together where there are more of these

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

// Part of the columns of a list's sum, and on to the next list.
template <class T, class Out>
struct RowSum {
    using A = Wide<T>;
    static constexpr int WIDTH = Vector<T>::WIDTH;
    Out* out;
    int64_t row_stride, size;
    A total[WIDTH] = {};

    __device__ void add(A value, const Vector<T>& x) {
        for (int i = 0; i < WIDTH; ++i) total[i] += value * widened(x.at[i]);
    }
    __device__ void finish() {
#pragma unroll
        for (int first = 0; first < WIDTH; first += Vector<Out>::WIDTH) {
            Vector<Out> sum;
            for (int i = 0; i < Vector<Out>::WIDTH; ++i) sum.at[i] = narrowed<Out>(total[first + i]);
            store_part(out + first, sum, size - first);
        }
        for (A& x : total) x = 0;
        out += row_stride;
    }
};

// Lists blockIdx.x / parts * count ... one after the other, as one list of entries that the block's threads fetch together.
template <class T, class Out>
__global__ void __launch_bounds__(SUM_THREADS)
    sum_rows_kernel(Lists lists, Matrix matrix, Matrix out, int64_t parts, int64_t count) {
    using A = Wide<T>;
    __shared__ int64_t start[LISTS], before[LISTS + 1];  // in the lists' memory; among the entries of this block
    __shared__ int32_t source_row[SUM_THREADS];
    __shared__ A value[SUM_THREADS];
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first_list = blockIdx.x / parts * count, part = blockIdx.x % parts;
    const int size = static_cast<int>(smaller(count, out.rows - first_list));
    if (thread < size) {
        start[thread] = lists.start[first_list + thread];
        before[thread + 1] = lists.stop[first_list + thread] - start[thread];
    }
    __syncthreads();
    if (thread == 0) {
        before[0] = 0;
        for (int i = 0; i < size; ++i) before[i + 1] += before[i];
    }
    __syncthreads();

    const int64_t column = (part * SUM_THREADS + thread) * Vector<T>::WIDTH, columns = matrix.columns - column;
    const T* source = static_cast<const T*>(matrix.data) + column;
    RowSum<T, Out> sum{static_cast<Out*>(out.data) + first_list * out.row_stride + column, out.row_stride, columns};
    int list = 0;
    for (int64_t first = 0; first < before[size]; first += SUM_THREADS) {
        const int fetched = static_cast<int>(smaller(SUM_THREADS, before[size] - first));
        if (thread < fetched) {
            int own = 0;
            while (before[own + 1] <= first + thread) ++own;
            const int64_t entry = start[own] + first + thread - before[own];
            source_row[thread] = lists.source_row[entry];
            value[thread] = static_cast<const A*>(lists.value)[entry];
        }
        __syncthreads();
        for (int next = 0; next < fetched; next += ENTRIES) {
            Vector<T> x[ENTRIES];
#pragma unroll
            for (int e = 0; e < ENTRIES; ++e)
                if (next + e < fetched) x[e] = load_part(source + source_row[next + e] * matrix.row_stride, columns);
#pragma unroll
            for (int e = 0; e < ENTRIES; ++e) {
                if (next + e >= fetched) continue;
                for (; before[list + 1] <= first + next + e; ++list) sum.finish();
                sum.add(value[next + e], x[e]);
            }
        }
        __syncthreads();
    }
    for (; list < size; ++list) sum.finish();
}

}  // namespace

void fold_sample(const Tile& tile, const Transform& transform, const Sampling& sampling, const Samples& samples,
                 cudaStream_t stream) {
    if (tile.rows == 0 || tile.columns == 0) return;
    by_dtype(tile.dtype, [&](auto element) {
        using T = decltype(element);
        const auto kernel = transform.softcap ? sample_kernel<T, true> : sample_kernel<T, false>;
        launch(kernel, tile.rows, THREADS, stream, tile, transform, sampling, samples);
    });
}

void sum_rows(const Lists& lists, const Matrix& matrix, const Matrix& out, cudaStream_t stream) {
    if (out.rows == 0 || out.columns == 0) return;
    by_dtype(matrix.dtype, [&](auto element) {
        using T = decltype(element);
        const int64_t parts = ceil_div(out.columns, SUM_THREADS * Vector<T>::WIDTH);
        const int64_t count = std::min<int64_t>(LISTS, ceil_div(out.rows * parts, BLOCKS));
        const auto kernel = out.dtype == matrix.dtype ? sum_rows_kernel<T, T> : sum_rows_kernel<T, Wide<T>>;
        launch(kernel, ceil_div(out.rows, count) * parts, SUM_THREADS, stream, lists, matrix, out, parts, count);
    });
}

}  // namespace mopo
