// exp and tanh of float vectors, written once over the operations that every instruction set offers.
#pragma once

namespace mopo {
namespace {

// e^x, at most 2 ulp off for every float x, subnormal results included; exp(-inf) = 0, exp(inf) = inf, NaN stays NaN.
// x = n ln 2 + r with |r| <= ln(2) / 2, ln 2 in two parts whose first has so few bits that n * part is exact
// (Cody and Waite); the polynomial is Cephes' expf.
template <class V>
inline typename V::reg float_exp(typename V::reg x) {
    x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));  // e^89 overflows, e^-104 is below half of the smallest
    const auto n = V::round(V::mul(x, V::set(1.44269504088896341f)));
    auto r = V::fma(n, V::set(-0.693359375f), x);
    r = V::fma(n, V::set(2.12194440e-4f), r);
    auto y = V::set(1.9875691500e-4f);
    y = V::fma(y, r, V::set(1.3981999507e-3f));
    y = V::fma(y, r, V::set(8.3334519073e-3f));
    y = V::fma(y, r, V::set(4.1665795894e-2f));
    y = V::fma(y, r, V::set(1.6666665459e-1f));
    y = V::fma(y, r, V::set(5.0000001201e-1f));
    y = V::add(V::fma(y, V::mul(r, r), r), V::set(1.0f));
    return V::scale(y, n);
}

// tanh x: an odd polynomial (Cephes' tanhf) near 0, where 1 - 2 / (e^2x + 1) would cancel.
template <class V>
inline typename V::reg float_tanh(typename V::reg x) {
    const auto magnitude = V::abs(x);
    const auto exponential = float_exp<V>(V::add(magnitude, magnitude));
    const auto far = V::sub(V::set(1.0f), V::div(V::set(2.0f), V::add(exponential, V::set(1.0f))));
    const auto square = V::mul(x, x);
    auto near = V::set(-5.70498872745e-3f);
    near = V::fma(near, square, V::set(2.06390887954e-2f));
    near = V::fma(near, square, V::set(-5.37397155531e-2f));
    near = V::fma(near, square, V::set(1.33314422036e-1f));
    near = V::fma(near, square, V::set(-3.33332819422e-1f));
    near = V::fma(V::mul(near, square), x, x);
    return V::select_less(magnitude, V::set(0.625f), near, V::copy_sign(far, x));
}

}  // namespace
}  // namespace mopo
