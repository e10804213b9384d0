// Vectors without intrinsics: arrays of 8 floats that any compiler turns into its baseline SIMD, and single doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fold.h"
#include "vec_math.h"

namespace mopo {
namespace {

inline float to_float(float x) { return x; }

inline float to_float(bfloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

inline float to_float(float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    float y;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
        const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
        std::memcpy(&y, &bits, 4);
        return y;
    }
    const uint32_t bits = magnitude << 13;  // exponent still biased by 15: one multiplication mends it, subnormals too
    std::memcpy(&y, &bits, 4);
    y *= 0x1p112f;
    return sign ? -y : y;
}

inline void from_float(float x, float& y) { y = x; }

inline void from_float(float x, bfloat16& y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) {
        y.bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
        return;
    }
    y.bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);  // round half to even
}

inline void from_float(float x, float16& y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) {
        y.bits = sign | 0x7e00u;
    } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
        y.bits = sign | 0x7c00u;
    } else if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the float adder do the rounding
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        y.bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
    } else {
        y.bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
    }
}

struct PortableFloat {
    using scalar = float;
    static constexpr int width = 8;
    struct reg {
        float v[width];
    };

    template <class F>
    static reg map(F f) {
        reg y;
        for (int i = 0; i < width; ++i) y.v[i] = f(i);
        return y;
    }

    template <class T>
    static reg load(const T* x) {
        return map([&](int i) { return to_float(x[i]); });
    }
    template <class T>
    static reg load(const T* x, int count, float fill) {
        return map([&](int i) { return i < count ? to_float(x[i]) : fill; });
    }
    template <class T>
    static void store(T* x, reg a) {
        for (int i = 0; i < width; ++i) from_float(a.v[i], x[i]);
    }
    template <class T>
    static void store(T* x, reg a, int count) {
        for (int i = 0; i < count; ++i) from_float(a.v[i], x[i]);
    }

    // As doubles, rounded to the grid of fold_sample.
    struct wide {
        double v[width];
    };
    static wide on_grid(reg t) {
        wide y;
        for (int i = 0; i < width; ++i) y.v[i] = (t.v[i] + GRID) - GRID;
        return y;
    }
    static wide add(wide a, wide b) {
        for (int i = 0; i < width; ++i) a.v[i] += b.v[i];
        return a;
    }
    static void store(double* x, wide a) { std::memcpy(x, a.v, sizeof a.v); }
    static double sum(wide a) {
        double y = 0;
        for (double x : a.v) y += x;
        return y;
    }

    static reg set(float a) {
        return map([&](int) { return a; });
    }
    static reg add(reg a, reg b) {
        return map([&](int i) { return a.v[i] + b.v[i]; });
    }
    static reg sub(reg a, reg b) {
        return map([&](int i) { return a.v[i] - b.v[i]; });
    }
    static reg mul(reg a, reg b) {
        return map([&](int i) { return a.v[i] * b.v[i]; });
    }
    static reg div(reg a, reg b) {
        return map([&](int i) { return a.v[i] / b.v[i]; });
    }
    static reg fma(reg a, reg b, reg c) {
        return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    // b where either is NaN, as the x86 instructions do.
    static reg max(reg a, reg b) {
        return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static reg min(reg a, reg b) {
        return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    static reg abs(reg a) {
        return map([&](int i) { return a.v[i] < 0 ? -a.v[i] : a.v[i]; });
    }
    static reg copy_sign(reg magnitude, reg sign) {
        return map([&](int i) { return sign.v[i] < 0 ? -magnitude.v[i] : magnitude.v[i]; });
    }
    static reg select_less(reg a, reg b, reg then, reg otherwise) {
        return map([&](int i) { return a.v[i] < b.v[i] ? then.v[i] : otherwise.v[i]; });
    }
    // Nearest integer of |a| < 2^22.
    static reg round(reg a) {
        return map([&](int i) {
            const float shifted = a.v[i] + 12582912.0f;
            return shifted - 12582912.0f;
        });
    }
    // a * 2^n in two exact factors, so that only a subnormal result rounds.
    static reg scale(reg a, reg n) {
        return map([&](int i) {
            const int32_t whole = n.v[i] == n.v[i] ? static_cast<int32_t>(n.v[i]) : 0;
            const int32_t half = whole >> 1;
            const uint32_t bits[2] = {static_cast<uint32_t>(half + 127) << 23,
                                      static_cast<uint32_t>(whole - half + 127) << 23};
            float factor[2];
            std::memcpy(factor, bits, 8);
            return a.v[i] * factor[0] * factor[1];
        });
    }
    static float sum(reg a) {
        float y = 0;
        for (int i = 0; i < width; ++i) y += a.v[i];
        return y;
    }
    static float max(reg a) {
        float y = a.v[0];
        for (int i = 1; i < width; ++i) y = a.v[i] > y ? a.v[i] : y;
        return y;
    }
    static reg exp(reg x) { return float_exp<PortableFloat>(x); }
    static reg tanh(reg x) { return float_tanh<PortableFloat>(x); }
};

struct PortableDouble {
    using scalar = double;
    using reg = double;
    static constexpr int width = 1;

    static reg load(const double* x) { return *x; }
    static reg load(const double* x, int, double) { return *x; }
    static void store(double* x, reg a) { *x = a; }
    static void store(double* x, reg a, int) { *x = a; }
    static reg on_grid(reg t) { return (t + GRID) - GRID; }
    static reg set(double a) { return a; }
    static reg add(reg a, reg b) { return a + b; }
    static reg sub(reg a, reg b) { return a - b; }
    static reg mul(reg a, reg b) { return a * b; }
    static reg fma(reg a, reg b, reg c) { return a * b + c; }
    static reg max(reg a, reg b) { return a > b ? a : b; }
    static reg abs(reg a) { return std::abs(a); }
    static reg select_less(reg a, reg b, reg then, reg otherwise) { return a < b ? then : otherwise; }
    static double sum(reg a) { return a; }
    static double max(reg a) { return a; }
    static reg exp(reg x) { return std::exp(x); }
    static reg tanh(reg x) { return std::tanh(x); }
};

}  // namespace
}  // namespace mopo
