// The softmax of attention as a sum that runs over tiles of keys, and its gradient. E: powers of 2, with the unit
// log2(e) in the logits, or of e.
//
//   forward    m'  = max(m, max_j t_j)             the running maximum, from the tile's logits t_j
//              f   = E(m - m')                     what the sums so far are multiplied by
//              w_j = E(t_j - m')
//              l'  = f l + sum_j w_j,  o' = f o + sum_j w_j v_j
//              out = o / l,  lse = m ln E(1) + ln l
//   backward   p_j = E(t_j - lse),  delta = sum_c dout_c out_c,  dt_j = p_j (dout . v_j - delta)
//
// The functions are written over an arithmetic A of T, which may be a vector of an instruction set:
//   max, sub, mul, fma; power: E; base(m): what is subtracted in exponents for a maximum m
// CONTRIBUTING.md ("Where a formula stands more than once") says which kernels round another way and do without one of
// them.
#pragma once

#include "arith.h"

// The attribute of the functions: a file with vectors in them says its target, one of device code that it is.
#if !defined(DK_SOFTMAX)
#define DK_SOFTMAX DK_HD
#endif

namespace dk {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.69314718055994531f;

// Numbers, rounded as core/arith.h says.
struct SoftmaxScalars {
  template <class T>
  static DK_SOFTMAX T sub(T a, T b) {
    return dk::sub(a, b);
  }
  template <class T>
  static DK_SOFTMAX T mul(T a, T b) {
    return dk::mul(a, b);
  }
  template <class T>
  static DK_SOFTMAX T fma(T a, T b, T c) {
    return dk::fma(a, b, c);
  }
};

// The running maximum takes in `seen`. Gives the base of the exponents; returns f.
template <class A, class T>
DK_SOFTMAX T softmax_advance(const A& a, T& maximum, T seen, T& base) {
  const T before = maximum;
  maximum = a.max(seen, before);
  base = a.base(maximum);
  return a.power(a.sub(before, base));
}

template <class A, class T>
DK_SOFTMAX T softmax_weight(const A& a, T logit, T base) {
  return a.power(a.sub(logit, base));
}

// The running sum takes in the sum of a tile's weights.
template <class A, class T>
DK_SOFTMAX T softmax_sum(const A& a, T sum, T f, T tile) {
  return a.fma(sum, f, tile);
}

template <class A, class T>
DK_SOFTMAX T softmax_gradient(const A& a, T p, T dp, T delta) {
  return a.mul(p, a.sub(dp, delta));
}

}  // namespace dk
