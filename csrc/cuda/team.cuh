// The threads of a warp or of a block as a Team (labels.h): sums are butterflies over lanes, then over warps in order.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace mopo {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

// THREADS of a block that has no more; or, with THREADS = WARP, each of its warps for itself.
template <int THREADS>
struct Team {
    static constexpr int WARPS = THREADS / WARP;

    static __device__ int rank() { return static_cast<int>(threadIdx.x) % THREADS; }

    static __device__ void synchronize() {
        if constexpr (WARPS > 1)
            __syncthreads();
        else
            __syncwarp();
    }

    // Each x[n] becomes `combine` over the threads' x[n], the same bits in all of them.
    template <int N, class F>
    static __device__ void reduce(double (&x)[N], F combine) {
        __syncwarp();  // shuffles alone do not order what lanes have written to memory
        for (double& value : x)
            for (int lane = WARP / 2; lane > 0; lane /= 2)
                value = combine(value, __shfl_xor_sync(ALL_LANES, value, lane));
        if constexpr (WARPS > 1) {
            __shared__ double of_warp[WARPS][N];
            if (rank() % WARP == 0)
                for (int n = 0; n < N; ++n) of_warp[rank() / WARP][n] = x[n];
            __syncthreads();
            for (int n = 0; n < N; ++n) {
                x[n] = of_warp[0][n];
                for (int warp = 1; warp < WARPS; ++warp) x[n] = combine(x[n], of_warp[warp][n]);
            }
            __syncthreads();
        }
    }

    static __device__ double sum(double x) {
        double value[1] = {x};
        reduce(value, [](double a, double b) { return a + b; });
        return value[0];
    }

    static __device__ double max(double x) {
        double value[1] = {x};
        reduce(value, [](double a, double b) { return fmax(a, b); });
        return value[0];
    }

    template <class F>
    __device__ void for_each(int64_t n, F f) const {
        for (int64_t i = rank(); i < n; i += THREADS) f(i);
        synchronize();
    }

    template <int N, class F>
    __device__ void sum(int64_t n, double (&total)[N], F f) const {
        for (double& value : total) value = 0;
        for (int64_t i = rank(); i < n; i += THREADS) f(i, total);
        reduce(total, [](double a, double b) { return a + b; });
    }

    template <class F>
    __device__ double min(int64_t n, F f) const {
        return -max(n, [&](int64_t i) { return -f(i); });
    }

    template <class F>
    __device__ double max(int64_t n, F f) const {
        double largest = -INFINITY;
        for (int64_t i = rank(); i < n; i += THREADS) largest = fmax(largest, f(i));
        return max(largest);
    }

    template <class F>
    __device__ void once(F f) const {
        if (rank() == 0) f();
        synchronize();
    }
};

}  // namespace mopo
