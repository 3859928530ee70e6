// Weighted squared error against a target that is never stored, and its gradient.
//
//   L_b = weight_b / N sum_i (pred_i - (u x0_i + v eps_i))^2,   dL_b/dpred_i = 2 weight_b / N (pred_i - target_i)
//
// The squares are added in the order of ordered_sum.h.
#pragma once

#include "noising.h"
#include "ordered_sum.h"

namespace dk {

#define DK_LOSS_COLUMNS(COLUMN) COLUMN(kLossX0, "u") COLUMN(kLossEps, "v") COLUMN(kLossWeight, "weight")
enum LossColumn : int { DK_LOSS_COLUMNS(DK_COLUMN_NUMBER) kLossColumns };

struct LossArgs {
  Space space;
  View pred, x0, noise, grad;  // grad: may be absent
  Rows rows;
  Seeds seeds;
  uint64_t stream;
  Reduction reduction;
  void* partials;  // [batch, sum_blocks(count)] float32 (float64 if x0 is)
  void* value;     // [batch], or [1] after a reduction over the batch
  void* samples;   // [batch] workspace of that reduction
};

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

namespace cpu {
void loss(const LossArgs& args, int64_t begin, int64_t end);
void loss_finish(const LossArgs& args);
}  // namespace cpu
namespace cuda {
int loss(const LossArgs& args, void* stream);  // the whole loss: partials, samples and the batch
}

}  // namespace dk
