// exp, log and the tail of the normal distribution in a fixed sequence of correctly rounded operations, so that every
// device gives the same bits. The polynomials are made by tools/fit_gaussian_functions.py.
//
// All functions pass NaN on. Errors: a few units in the last place of the result.
#pragma once

#include "arith.h"
#include "normal.h"

namespace dk {

// sum_k c[k] x^k
template <int K = 0, class T, int N>
DK_HD T polynomial(const T (&c)[N], T x) {
  if constexpr (K == N - 1) {
    return c[K];
  } else {
    return fma(polynomial<K + 1>(c, x), x, c[K]);
  }
}

// What the functions need to know of a number type.
template <class T>
struct Real;

template <>
struct Real<float> {
  static constexpr float kLow = -104.0f, kHigh = 89.0f;  // exp is 0 below, infinite above
  static constexpr float kInvLn2 = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
  static constexpr float kShift = 12582912.0f;  // 1.5 2^23: x + kShift has the rounded x in its low bits
  static DK_HD float exp_rest(float f) {
    constexpr float c[] = {0.5f, 0.166666672f, 0.0416664556f, 0.00833329745f, 0.0013934545f, 0.00019900444f};
    return polynomial(c, f);
  }
  static DK_HD float scaled_tail(float y) {
    constexpr float c[] = {0.755285144f,   -0.607896388f,    0.387137383f,    -0.186526716f,
                           0.0603966489f,  -0.00751223136f,  -0.00347995455f, 0.00156378688f,
                           0.00013365339f, -0.000157320566f, -1.73108231e-06f};
    return polynomial(c, y);
  }
  // v 2^n in two steps, each a normal number: n may lead into subnormal results. `shifted` = n + kShift.
  static DK_HD float scale(float v, float shifted) {
    const int32_t n = static_cast<int32_t>(float_bits(shifted) - float_bits(kShift)), half = n >> 1;
    return mul(mul(v, bits_float(static_cast<uint32_t>(half + 127) << 23)),
               bits_float(static_cast<uint32_t>(n - half + 127) << 23));
  }
};

template <>
struct Real<double> {
  static constexpr double kLow = -746.0, kHigh = 710.0;
  static constexpr double kInvLn2 = 1.4426950408889634, kLn2High = 0.69314718036912382,
                          kLn2Low = 1.9082149292705877e-10;
  static constexpr double kShift = 6755399441055744.0;  // 1.5 2^52
  static DK_HD double exp_rest(double f) {
    constexpr double c[] = {0.49999999999999994,    0.16666666666666669,    0.041666666666666685,
                            0.008333333333333335,   0.0013888888888878271,  0.00019841269841257576,
                            2.4801587338566815e-05, 2.7557319258321013e-06, 2.7557261027967865e-07,
                            2.5052061688562593e-08, 2.0918962286978822e-09, 1.6089523664839434e-10};
    return polynomial(c, f);
  }
  static DK_HD double scaled_tail(double y) {
    constexpr double c[] = {
        0.75528513041575152,    -0.60789664197189219,    0.38713740074221442,     -0.18652185795965484,
        0.060396574890943237,   -0.0075401889668252411,  -0.0034796923676058359,  0.001630818459394586,
        0.00013334431578740138, -0.0002310949532401944,  -1.9082897052826149e-06, 3.5144794787533558e-05,
        7.1684794463461225e-07, -5.9205865195568907e-06, -6.3038972304722211e-07, 1.0225604158296038e-06,
        2.7356894790742907e-07, -1.5650236461993103e-07, -8.8384479723075442e-08, 1.4630727405651177e-08,
        2.2833760070320696e-08, 1.4329918401088606e-09,  -4.5706864641533491e-09, -8.5465218998801423e-10,
        6.3251953774668104e-10, 1.1754789914807741e-10,  -4.4952047212574169e-11};
    return polynomial(c, y);
  }
  static DK_HD double scale(double v, double shifted) {
    const int64_t n = static_cast<int64_t>(double_bits(shifted) - double_bits(kShift)), half = n >> 1;
    return mul(mul(v, bits_double(static_cast<uint64_t>(half + 1023) << 52)),
               bits_double(static_cast<uint64_t>(n - half + 1023) << 52));
  }
};

// exp t, and exp t - 1 - t without cancellation near 0.
template <class T>
struct Exponential {
  T value, minus_1, minus_1_t;
};

template <class T>
DK_HD Exponential<T> exponential(T t) {
  using R = Real<T>;
  const T above = t < R::kLow ? R::kLow : t, x = above > R::kHigh ? R::kHigh : above;
  const T shifted = fma(x, R::kInvLn2, R::kShift), n = sub(shifted, R::kShift);
  const T f = fma(n, -R::kLn2Low, fma(n, -R::kLn2High, x));
  const T rest = mul(mul(f, f), R::exp_rest(f));
  const T value = R::scale(add(T(1), add(f, rest)), shifted);
  const bool small = n == T(0);
  const T minus_1 = small ? add(f, rest) : sub(value, T(1));
  return {value, minus_1, small ? rest : sub(minus_1, t)};
}

// ln u for positive normal u.
DK_HD float log_positive(float u) { return log_unit(u); }
DK_HD double log_positive(double u) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdu;
  // 2 atanh(s) = 2 s + s^3 (2/3 + 2/5 s^2 + ...) with s = f / (2 + f), |s| < 0.172
  constexpr double c[] = {2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,  2.0 / 11,
                          2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19, 2.0 / 21};
  const uint64_t shifted = double_bits(u) - kSqrtHalf;
  const double e = static_cast<double>(static_cast<int32_t>(static_cast<int64_t>(shifted) >> 52));
  const double f = sub(bits_double((shifted & 0x000fffffffffffffu) + kSqrtHalf), 1.0);
  const double s = div(f, add(2.0, f)), z = mul(s, s);
  const double log1p = fma(mul(s, z), polynomial(c, z), mul(2.0, s));
  return fma(e, 0.69314718055994531, log1p);
}

// ln(1 + x) for x in [-1 + 2^-20, 1], to the last places also near 0.
template <class T>
DK_HD T log_1p(T x) {
  const T u = add(T(1), x), rounded = sub(u, T(1));
  const T ratio = div(mul(log_positive(u), x), rounded);
  return rounded == T(0) ? x : ratio;
}

constexpr double kHalfLn2Pi = 0.91893853320467274, kInvSqrt2Pi = 0.39894228040143268;

// R(x) = Q(x) exp(x^2 / 2) for x >= 0, where Q(x) is the probability that a normal exceeds x.
template <class T>
DK_HD T tail(T x) {
  constexpr T kLarge = static_cast<T>(1e18);  // its square is finite
  const T at = x > kLarge ? kLarge : x;
  const T sum = add(at, T(4));
  return div(Real<T>::scaled_tail(div(sub(at, T(4)), sum)), sum);
}

}  // namespace dk
