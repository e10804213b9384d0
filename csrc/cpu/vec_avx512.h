// Vectors of 16 floats: AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "fold.h"
#include "vec_math.h"

namespace mopo {
namespace {

struct Avx512Float {
    using scalar = float;
    using reg = __m512;
    static constexpr int width = 16;

    static __mmask16 mask(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
    static reg widen(__m256i x, const bfloat16*) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
    }
    static reg widen(__m256i x, const float16*) { return _mm512_cvtph_ps(x); }
    static __m256i narrow(reg a, const bfloat16*) {
        const __m512i bits = _mm512_castps_si512(a);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i half_even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, half_even, quiet), 16));
    }
    static __m256i narrow(reg a, const float16*) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }

    static reg load(const float* x) { return _mm512_loadu_ps(x); }
    static reg load(const float* x, int count, float fill) {
        return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), mask(count), x);
    }
    static void store(float* x, reg a) { _mm512_storeu_ps(x, a); }
    static void store(float* x, reg a, int count) { _mm512_mask_storeu_ps(x, mask(count), a); }

    template <class T>
    static reg load(const T* x) {
        return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), x);
    }
    template <class T>
    static reg load(const T* x, int count, float fill) {
        return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask(count), widen(_mm256_maskz_loadu_epi16(mask(count), x), x));
    }
    template <class T>
    static void store(T* x, reg a) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), narrow(a, x));
    }
    template <class T>
    static void store(T* x, reg a, int count) {
        _mm256_mask_storeu_epi16(x, mask(count), narrow(a, x));
    }

    // As doubles, rounded to the grid of fold_sample.
    struct wide {
        __m512d low, high;
    };
    static wide on_grid(reg t) {
        const __m512d grid = _mm512_set1_pd(GRID);
        const auto rounded = [&](__m256 x) { return _mm512_sub_pd(_mm512_add_pd(_mm512_cvtps_pd(x), grid), grid); };
        return {rounded(_mm512_castps512_ps256(t)), rounded(_mm512_extractf32x8_ps(t, 1))};
    }
    static wide add(wide a, wide b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
    static void store(double* x, wide a) {
        _mm512_storeu_pd(x, a.low);
        _mm512_storeu_pd(x + 8, a.high);
    }
    static double sum(wide a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.low, a.high)); }

    static reg set(float a) { return _mm512_set1_ps(a); }
    static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
    static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
    static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
    static reg div(reg a, reg b) { return _mm512_div_ps(a, b); }
    static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
    static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }
    static reg min(reg a, reg b) { return _mm512_min_ps(a, b); }
    static reg abs(reg a) { return _mm512_abs_ps(a); }
    static reg copy_sign(reg magnitude, reg sign) {
        return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
    }
    static reg select_less(reg a, reg b, reg then, reg otherwise) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
    }
    static reg round(reg a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static reg scale(reg a, reg n) { return _mm512_scalef_ps(a, n); }
    static float sum(reg a) { return _mm512_reduce_add_ps(a); }
    static float max(reg a) { return _mm512_reduce_max_ps(a); }
    static reg exp(reg x) { return float_exp<Avx512Float>(x); }
    static reg tanh(reg x) { return float_tanh<Avx512Float>(x); }
};

}  // namespace
}  // namespace mopo
