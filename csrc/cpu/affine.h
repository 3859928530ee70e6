// out = a x + b z over a span, for noising and sums of noise.
#pragma once

#include "../core/noising.h"
#include "levels.h"

namespace dk::cpu {

struct Affine {  // out may be x
  template <class T>
  DK_BODY static void run(T a, const T* x, T b, const T* z, T* out, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = affine(a, x[i], b, z[i]);
  }
};

}  // namespace dk::cpu
