// Forward noising and the training target: x_t = s x0 + n eps, target = u x0 + v eps.
#pragma once

#include "arith.h"

namespace dk {

enum NoisingColumn : int { kSignal, kNoise, kTargetX0, kTargetEps, kNoisingColumns };

template <class T>
struct NoisingCoefficients {
  T s, n, u, v;
};

template <class T>
DK_HD NoisingCoefficients<T> noising_coefficients(const double* row) {
  return {static_cast<T>(row[kSignal]), static_cast<T>(row[kNoise]), static_cast<T>(row[kTargetX0]),
          static_cast<T>(row[kTargetEps])};
}

// a x0 + b eps: both outputs of noising, and the target of the loss.
template <class T>
DK_HD T affine(T a, T x0, T b, T eps) {
  return fma(b, eps, mul(a, x0));
}

}  // namespace dk
