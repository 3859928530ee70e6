// Forward noising and the training target: x_t = s x0 + n eps, target = u x0 + v eps.
#pragma once

#include "args.h"

namespace dk {

#define DK_NOISING_COLUMNS(COLUMN) \
  COLUMN(kSignal, "s") COLUMN(kNoise, "n") COLUMN(kTargetX0, "u") COLUMN(kTargetEps, "v")
enum NoisingColumn : int { DK_NOISING_COLUMNS(DK_COLUMN_NUMBER) kNoisingColumns };

struct NoisingArgs {
  Space space;
  View x0, noise, out, target, eps;  // target, eps: may be absent
  Rows rows;
  Seeds seeds;
  uint64_t stream;
};

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

namespace cpu {
void noising(const NoisingArgs& args, int64_t begin, int64_t end);
}
namespace cuda {
int noising(const NoisingArgs& args, void* stream);
}

}  // namespace dk
