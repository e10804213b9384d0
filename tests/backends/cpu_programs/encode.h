// Numbers as elements of the kernels' dtypes.
#pragma once

#include <cmath>
#include <cstdint>

#include "fold.h"

template <class T>
T encode(double x);
template <>
inline float encode(double x) {
    return static_cast<float>(x);
}
template <>
inline double encode(double x) {
    return x;
}
template <>
inline mopo::bfloat16 encode(double x) {  // exact for the multiples of 1/8 below 16 used here
    const float y = static_cast<float>(x);
    uint32_t bits;
    __builtin_memcpy(&bits, &y, 4);
    return {static_cast<uint16_t>(bits >> 16)};
}
template <>
inline mopo::float16 encode(double x) {
    if (x == 0) return {0};
    int exponent;
    const double fraction = std::frexp(std::abs(x), &exponent);  // in [0.5, 1)
    const auto mantissa = static_cast<uint16_t>((fraction * 2 - 1) * 1024);
    return {static_cast<uint16_t>((x < 0 ? 0x8000 : 0) | (exponent + 14) << 10 | mantissa)};
}
