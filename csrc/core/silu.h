// u sigmoid(u) and its derivative, in a fixed sequence of correctly rounded operations.
//
//   sigmoid(u) = (e if u < 0 else 1) / (1 + e),  e = exp(-|u|)
//
// exp of core/gaussian.h is right to the last places into the subnormal numbers, which 1 + e does not show: here |u| is
// held to 87 (float64: 700), where 2^n exp(f) is one addition to the exponent. exp(f) = 1 + c1 f + ... + c5 f^5 for |f|
// <= ln 2 / 2 is a fit (tools/fit_gaussian_functions.py) within 9.2e-8 of itself. Below -87 the value stays what it is
// there, -1e-36. NaN passes on.
#pragma once

#include "gaussian.h"

namespace dk {

// -|u|, held; e; the numerators of sigmoid(u) and sigmoid(-u).
template <class T>
struct Sigmoid {
  T held, e, numerator, other;
};

DK_HD Sigmoid<float> sigmoid(float u) {
  using R = Real<float>;
  constexpr float kMost = 87.0f, kLn2 = 0.693147182f;
  constexpr float c[] = {1.0f, 0.999999702f, 0.499991506f, 0.166676372f, 0.0418979637f, 0.00829030853f};
  const float magnitude = bits_float(float_bits(u) & 0x7fffffffu), held = magnitude > kMost ? -kMost : -magnitude;
  const float shifted = fma(held, R::kInvLn2, R::kShift), n = sub(shifted, R::kShift);
  const float f = fma(n, -kLn2, held);  // the rounding of ln 2 is 2e-9 n
  const float e = bits_float(float_bits(polynomial(c, f)) + (float_bits(shifted) << 23));
  return {held, e, u < 0.0f ? e : 1.0f, u < 0.0f ? 1.0f : e};
}

DK_HD Sigmoid<double> sigmoid(double u) {
  constexpr double kMost = 700.0;
  const double magnitude = u < 0.0 ? -u : u, held = magnitude > kMost ? -kMost : -magnitude;
  const double e = exponential(held).value;
  return {held, e, u < 0.0 ? e : 1.0, u < 0.0 ? 1.0 : e};
}

template <class T>
DK_HD T silu(T u) {
  const Sigmoid<T> s = sigmoid(u);
  return div(mul(u < T(0) ? s.held : u, s.numerator), add(T(1), s.e));
}

// sigmoid(u) (1 + u sigmoid(-u))
template <class T>
DK_HD T silu_slope(T u) {
  const Sigmoid<T> s = sigmoid(u);
  const T inverse = div(T(1), add(T(1), s.e));
  return mul(mul(s.numerator, inverse), fma(u < T(0) ? s.held : -s.held, mul(s.other, inverse), T(1)));
}

}  // namespace dk
