// Vectors of 8 floats: AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "fold.h"
#include "vec_math.h"

namespace mopo {
namespace {

struct Avx2Float {
    using scalar = float;
    using reg = __m256;
    static constexpr int width = 8;

    static reg widen(__m128i x, const bfloat16*) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
    }
    static reg widen(__m128i x, const float16*) { return _mm256_cvtph_ps(x); }
    static __m128i narrow(reg a, const bfloat16*) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i half_even = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
        const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(half_even, quiet, nan), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    static __m128i narrow(reg a, const float16*) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

    static reg load(const float* x) { return _mm256_loadu_ps(x); }
    static void store(float* x, reg a) { _mm256_storeu_ps(x, a); }
    template <class T>
    static reg load(const T* x) {
        return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), x);
    }
    template <class T>
    static void store(T* x, reg a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), narrow(a, x));
    }
    // Tails go through a full vector on the stack: a row ends once, and masks do not exist for 16-bit elements.
    template <class T>
    static reg load(const T* x, int count, float fill) {
        T whole[width];
        store(whole, set(fill));
        std::memcpy(whole, x, sizeof(T) * count);
        return load(whole);
    }
    template <class T>
    static void store(T* x, reg a, int count) {
        T whole[width];
        store(whole, a);
        std::memcpy(x, whole, sizeof(T) * count);
    }

    // As doubles, rounded to the grid of fold_sample.
    struct wide {
        __m256d low, high;
    };
    static wide on_grid(reg t) {
        const __m256d grid = _mm256_set1_pd(GRID);
        const auto rounded = [&](__m128 x) { return _mm256_sub_pd(_mm256_add_pd(_mm256_cvtps_pd(x), grid), grid); };
        return {rounded(_mm256_castps256_ps128(t)), rounded(_mm256_extractf128_ps(t, 1))};
    }
    static wide add(wide a, wide b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
    static void store(double* x, wide a) {
        _mm256_storeu_pd(x, a.low);
        _mm256_storeu_pd(x + 4, a.high);
    }
    static double sum(wide a) {
        const __m256d four = _mm256_add_pd(a.low, a.high);
        const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
        return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }

    static reg set(float a) { return _mm256_set1_ps(a); }
    static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
    static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
    static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
    static reg div(reg a, reg b) { return _mm256_div_ps(a, b); }
    static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
    static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }
    static reg min(reg a, reg b) { return _mm256_min_ps(a, b); }
    static reg abs(reg a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static reg copy_sign(reg magnitude, reg sign) {
        return _mm256_or_ps(magnitude, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
    }
    static reg select_less(reg a, reg b, reg then, reg otherwise) {
        return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
    }
    static reg round(reg a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // a * 2^n in two exact factors, so that only a subnormal result rounds.
    static reg scale(reg a, reg n) {
        const __m256i whole = _mm256_cvtps_epi32(n);
        const __m256i half = _mm256_srai_epi32(whole, 1);
        return _mm256_mul_ps(_mm256_mul_ps(a, power(half)), power(_mm256_sub_epi32(whole, half)));
    }
    static reg power(__m256i n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }
    static float sum(reg a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static float max(reg a) {
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static reg exp(reg x) { return float_exp<Avx2Float>(x); }
    static reg tanh(reg x) { return float_tanh<Avx2Float>(x); }
};

}  // namespace
}  // namespace mopo
