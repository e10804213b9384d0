// What kernels that read rows of logits share: element types, 16-byte vectors, the transform of a logit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../contract.h"

namespace mopo {
namespace {

// ---------------------------------------------------------------------------------------------------- element types

__device__ float widened(float x) { return x; }
__device__ double widened(double x) { return x; }
__device__ float widened(__half x) { return __half2float(x); }
__device__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
using Wide = decltype(widened(T()));  // what arithmetic on T runs in

template <class T>
__device__ T narrowed(Wide<T> x) {
    return x;
}
template <>
__device__ __half narrowed<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __nv_bfloat16 narrowed<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// e^x within |x| 2^-24 + 2^-22, relative: exp2f is within 2 ulp, and the rounding of x * log2(e) grows with |x|, but the
// weight of what is small falls faster.
__device__ float exponential(float x) { return exp2f(x * 1.44269504088896341f); }
__device__ double exponential(double x) { return exp(x); }
__device__ float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ double hyperbolic_tangent(double x) { return tanh(x); }

__device__ int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

// ------------------------------------------------------------------------------------------------------------- rows

template <class T>
struct alignas(16) Vector {
    static constexpr int WIDTH = 16 / sizeof(T);
    T at[WIDTH];
};

// The columns of a row that lie in whole aligned vectors, and the edges before and behind them.
template <class T>
struct Row {
    static constexpr int64_t WIDTH = Vector<T>::WIDTH;
    int64_t columns, head, vectors;

    __device__ Row(const T* data, int64_t columns) : columns(columns) {
        const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) / sizeof(T)) % WIDTH;
        head = beyond == 0 ? 0 : WIDTH - beyond;
        if (head > columns) head = columns;
        vectors = (columns - head) / WIDTH;
    }
    __device__ int64_t column(int64_t vector) const { return head + vector * WIDTH; }
    __device__ int64_t edges() const { return columns - vectors * WIDTH; }
    __device__ int64_t edge(int64_t i) const { return i < head ? i : i + vectors * WIDTH; }
};

template <class T>
__device__ Vector<T> load(const T* address) {
    return *reinterpret_cast<const Vector<T>*>(address);
}

template <class T>
__device__ void store(T* address, const Vector<T>& x) {
    if (reinterpret_cast<uintptr_t>(address) % 16 == 0) {
        *reinterpret_cast<Vector<T>*>(address) = x;
    } else {
        for (int i = 0; i < Vector<T>::WIDTH; ++i) address[i] = x.at[i];
    }
}

// -------------------------------------------------------------------------------------------------------- transform

template <class A>
struct LogitTransform {
    const A* bias;
    A inner, outer;
    bool softcap;

    __device__ LogitTransform(const void* bias, const Transform& transform)
        : bias(static_cast<const A*>(bias)),
          inner(static_cast<A>(transform.inner)),
          outer(static_cast<A>(transform.outer)),
          softcap(transform.softcap) {}

    // logits of neighbouring columns ← inner * (logit + bias), the arguments of tanh where there is a softcap.
    template <int N>
    __device__ void scale(A (&x)[N], int64_t first_column) const {
        if (bias)
            for (int i = 0; i < N; ++i) x[i] += bias[first_column + i];
        for (A& u : x) u *= inner;
    }
    // logits ← z
    template <int N>
    __device__ void apply(A (&x)[N], int64_t first_column) const {
        scale(x, first_column);
        cap(x);
    }
    template <int N>
    __device__ void cap(A (&x)[N]) const {
        if (softcap)
            for (A& u : x) u = capped(u, hyperbolic_tangent(u));
    }
    __device__ A capped(A u, A tanh) const { return fabs(u) < static_cast<A>(INFINITY) ? outer * tanh : u; }
    __device__ A z(A logit, int64_t column) const {
        A x[1] = {logit};
        apply(x, column);
        return x[0];
    }
};

// lse in two parts: z - high is exact where z is near lse, so p does not feel the rounding of a large lse.
template <class A>
struct Shift {
    A high, low;
    __device__ explicit Shift(double lse) : high(static_cast<A>(lse)), low(static_cast<A>(lse - high)) {}
    __device__ A of(A z) const { return (z - high) - low; }
};

// -------------------------------------------------------------------------------------------------------- launching

// f(T()) of the element type.
template <class F>
void by_dtype(DType dtype, F f) {
    switch (dtype) {
        case DType::float32: return f(float());
        case DType::float64: return f(double());
        case DType::float16: return f(__half());
        case DType::bfloat16: return f(__nv_bfloat16());
    }
}

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

}  // namespace
}  // namespace mopo
