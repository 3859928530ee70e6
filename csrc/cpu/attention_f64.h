#pragma once

#include <algorithm>
#include <cmath>

#include "../core/attention.h"
#include "../core/softmax.h"

namespace dk::cpu {

// The arithmetic of core/softmax.h.
struct DoublePowers : SoftmaxScalars {
  static double max(double seen, double before) { return std::max(before, seen); }
  static double base(double maximum) { return maximum; }
  static double power(double x) { return std::exp(x); }
};

// attention() in float64: for gradcheck, so the plain formula and no micro-kernel. Tasks of `tile` queries.
void attention_f64(const AttentionArgs& args, int64_t begin, int64_t end, int64_t tile);

}  // namespace dk::cpu
