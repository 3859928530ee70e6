// Weighted squared error against a target that is never stored, and its gradient.
//
//   L_b = weight_b / N sum_i (pred_i - (u x0_i + v eps_i))^2,   dL_b/dpred_i = 2 weight_b / N (pred_i - target_i)
//
// The sum has one order, whatever the threads, the grid or the batch: blocks of kLossBlock consecutive elements are
// folded (element i + element i + half, half = kLossBlock / 2, ..., 1; missing elements are 0), and the blocks' sums
// of a sample are added by kLossLanes lanes (lane j takes blocks j, j + kLossLanes, ... in turn) and folded again.
#pragma once

#include "noising.h"

namespace dk {

enum LossColumn : int { kLossX0, kLossEps, kLossWeight, kLossColumns };
enum class Reduction : int32_t { none, mean, sum };

constexpr int kLossBlock = 1024;
constexpr int kLossLanes = 256;

template <class T>
struct LossCoefficients {
  T u, v;
  T value;     // weight / N, and 1 / batch for the mean over the batch
  T gradient;  // 2 value
};

// `count` = elements of a sample, `batch` = samples that the result is averaged over (1: no average).
template <class T>
DK_HD LossCoefficients<T> loss_coefficients(const double* row, int64_t count, int64_t batch) {
  const double scale = row[kLossWeight] / (static_cast<double>(count) * static_cast<double>(batch));
  return {static_cast<T>(row[kLossX0]), static_cast<T>(row[kLossEps]), static_cast<T>(scale),
          static_cast<T>(2 * scale)};
}

}  // namespace dk
