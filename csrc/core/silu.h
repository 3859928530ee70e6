// u sigmoid(u) and its derivative, in a fixed sequence of correctly rounded operations.
//
//   sigmoid(u) = 1 / (1 + e),  1 - sigmoid(u) = e / (1 + e),  e = exp(-u)
//
// exp of core/gaussian.h is right to the last places into the subnormal numbers, which 1 + e does not show: here u is
// held to +-87 (float64: 700), where 2^n exp(f) is one addition to the exponent. exp(f) = 1 + c1 f + ... + c5 f^5 for
// |f| <= ln 2 / 2 is a fit (tools/fit_gaussian_functions.py) within 9.6e-8 of itself. Below -87 the value stays what it
// is there, -1e-36. NaN passes on.
#pragma once

#include "gaussian.h"

namespace dk {

// u held from below; -u held from both sides; e.
template <class T>
struct Sigmoid {
  T above, minus, e;
};

DK_HD Sigmoid<float> sigmoid(float u) {
  using R = Real<float>;
  constexpr float kLn2 = 0.693147182f;
  constexpr uint32_t kSign = 0x80000000u, kMost = 0x42ae0000u;  // 87
  constexpr float c[] = {1.0f, 0.999999702f, 0.499991506f, 0.166676357f, 0.0418979302f, 0.00829031505f};
  // The magnitude by its bits: one minimum, where two comparisons of numbers that may be NaN are many instructions.
  const uint32_t bits = float_bits(u), magnitude = bits & ~kSign;
  const float minus = bits_float((~bits & kSign) | (magnitude < kMost ? magnitude : kMost));
  const float shifted = fma(minus, R::kInvLn2, R::kShift), n = sub(shifted, R::kShift);
  const float f = fma(n, -kLn2, minus);  // the rounding of ln 2 is 2e-9 n
  return {u < -87.0f ? -87.0f : u, minus, bits_float(float_bits(polynomial(c, f)) + (float_bits(shifted) << 23))};
}

DK_HD Sigmoid<double> sigmoid(double u) {
  constexpr double kMost = 700.0;
  const double above = u < -kMost ? -kMost : u, minus = above > kMost ? -kMost : -above;
  return {above, minus, exponential(minus).value};
}

template <class T>
DK_HD T silu(T u) {
  const Sigmoid<T> s = sigmoid(u);
  return div(s.above, add(T(1), s.e));
}

// sigmoid(u) (1 + u sigmoid(-u))
template <class T>
DK_HD T silu_slope(T u) {
  const Sigmoid<T> s = sigmoid(u);
  const T inverse = div(T(1), add(T(1), s.e));
  const T slope = mul(inverse, fma(-s.minus, mul(s.e, inverse), T(1)));
  return u == u ? slope : u;  // what is held by its bits is a number
}

}  // namespace dk
