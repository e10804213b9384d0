// CUDA on the CPU, as much of it as the kernels here use, for tests on machines without a GPU: put this directory before
// the toolkit's and the same sources compile as C++.
//
// Blocks run one after the other. A block's threads are fibers on stacks of their own, and a barrier or a shuffle is a
// switch to the next one. EMULATED_ORDER says who goes first: each warp runs as far ahead of the others as barriers let
// it, from the first to the last ("forward") or from the last to the first ("backward"), or the warps take turns at
// every barrier ("interleaved"). A result that hangs on it shows that a barrier is missing or memory shared by mistake.
// A barrier that some threads of the block never reach aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // blocks take turns
#define __launch_bounds__(...)

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorNoKernelImageForDevice = 209 };

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "emulated error";
}

struct dim3 {
    unsigned x = 1;
    dim3(unsigned x = 1) : x(x) {}
};

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx;

namespace emulation {

constexpr unsigned WARP = 32;

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Fiber {
    State state = State::done;
    bool started = false;
    jmp_buf place;
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

inline std::vector<Fiber> fibers(1024);
inline std::function<void()> body;
inline jmp_buf scheduler;
inline double exchanged[1024];

inline void pause(State state) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.state = state;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

// A fiber lives on from block to block and from launch to launch.
inline void live() {
    for (;;) {
        body();
        pause(State::done);
    }
}

inline void resume(unsigned thread) {
    constexpr size_t STACK = 256 << 10;
    threadIdx.x = thread;
    Fiber& fiber = fibers[thread];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    makecontext(&fiber.context, live, 0);
    setcontext(&fiber.context);
}

// Lets the threads first .. last - 1 go on if all of them that still run wait at this barrier.
inline bool released(unsigned first, unsigned last, State barrier) {
    bool waiting = false;
    for (unsigned thread = first; thread < last; ++thread) {
        const State state = fibers[thread].state;
        if (state != barrier && state != State::done) return false;
        waiting |= state == barrier;
    }
    for (unsigned thread = first; thread < last; ++thread)
        if (fibers[thread].state == barrier) fibers[thread].state = State::ready;
    return waiting;
}

enum class Order { forward, backward, interleaved };

inline Order order_of(const char* name) {
    if (name && std::strcmp(name, "backward") == 0) return Order::backward;
    return name && std::strcmp(name, "interleaved") == 0 ? Order::interleaved : Order::forward;
}

// Runs the threads of a warp until all wait for the block or are done, or only to their next barrier; whether they
// could go on.
inline bool run_warp(unsigned first, unsigned last, Order order) {
    bool more = true;
    while (more) {
        for (unsigned i = 0; i < last - first; ++i) {
            const unsigned thread = order == Order::backward ? last - 1 - i : first + i;
            if (fibers[thread].state == State::ready) resume(thread);
        }
        more = released(first, last, State::at_warp_barrier);
        if (order == Order::interleaved) break;
    }
    return more;
}

inline void run_block(unsigned threads, Order order) {
    const unsigned warps = (threads + WARP - 1) / WARP;
    for (unsigned thread = 0; thread < threads; ++thread) fibers[thread].state = State::ready;
    for (bool more = true; more;) {
        more = false;
        for (unsigned i = 0; i < warps; ++i) {
            const unsigned first = WARP * (order == Order::backward ? warps - 1 - i : i);
            more |= run_warp(first, first + WARP < threads ? first + WARP : threads, order);
        }
        more |= released(0, threads, State::at_block_barrier);
    }
    for (unsigned thread = 0; thread < threads; ++thread) {
        if (fibers[thread].state == State::done) continue;
        std::fprintf(stderr, "thread %u of block %u waits at a barrier that others do not reach\n", thread, blockIdx.x);
        std::abort();
    }
}

}  // namespace emulation

inline void __syncthreads() { emulation::pause(emulation::State::at_block_barrier); }
inline void __syncwarp() { emulation::pause(emulation::State::at_warp_barrier); }

// What the lane `from` has, which every lane of the warp asks for at once.
template <class T>
T __shfl_sync(unsigned, T x, int from) {
    static_assert(sizeof(T) == sizeof(double));
    const unsigned first = threadIdx.x / emulation::WARP * emulation::WARP;
    std::memcpy(&emulation::exchanged[threadIdx.x], &x, sizeof(T));
    __syncwarp();
    T other;
    std::memcpy(&other, &emulation::exchanged[first + static_cast<unsigned>(from) % emulation::WARP], sizeof(T));
    __syncwarp();
    return other;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T x, int mask) {
    return __shfl_sync(lanes, x, static_cast<int>(threadIdx.x % emulation::WARP) ^ mask);
}

// Lanes that have none so far below them keep their own.
template <class T>
T __shfl_up_sync(unsigned lanes, T x, int below) {
    const int lane = static_cast<int>(threadIdx.x % emulation::WARP);
    return __shfl_sync(lanes, x, lane < below ? lane : lane - below);
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline long long __float2ll_rn(float x) { return std::llrint(x); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
    const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
    if (blocks == 0 || threads == 0 || threads > 1024) return cudaErrorInvalidConfiguration;
    const emulation::Order order = emulation::order_of(std::getenv("EMULATED_ORDER"));
    emulation::body = [=] { kernel(arguments...); };
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) emulation::run_block(threads, order);
    return cudaSuccess;
}
