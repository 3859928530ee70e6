// The sampler step of a network that learned its variance: the step of core/step.h whose noise has a standard deviation
// of its own in every element (docs: diffkern.ops.learned_step).
//
//   m, v = halves of the network's channels
//   x0   = clamp(p x + q m, -clip, clip)
//   x'   = a x + b x0 + d m + g exp((r0 + r1 v) / 2) z
//   x'   = x' where mask is 1, known_s known + known_n z2 where it is 0, the blend of both between
//
// A row is that of the step, with guidance, late noise, histories and the second output at 0, and r0, r1 behind it.
#pragma once

#include "gaussian.h"
#include "step.h"

namespace dk {

#define DK_LEARNED_COLUMNS(COLUMN) DK_STEP_COLUMNS(COLUMN) COLUMN(kLogVariance0, "r0") COLUMN(kLogVariance1, "r1")
enum LearnedColumn : int { kLogVariance0 = kColumns, kLogVariance1, kLearnedColumns };  // behind those of the step

// Beside the terms of the step: v is read.
constexpr uint32_t kTermV = 1u << 19;

struct LearnedStepArgs {
  Space space;
  View x, m, v, noise, mask, known;  // inputs; all but x may be absent. m, v: the halves of the prediction
  View out, x0, next, next2;         // outputs, as in StepArgs
  Dtype state;                       // of x, noise, known, out, x0
  Rows rows;
  double row[kLearnedColumns];  // the row, if rows.table is nullptr
  Seeds seeds;
};

// A column that must be 0 and is not, or kLearnedColumns.
DK_HD int learned_step_excess(const double* row) {
  constexpr uint32_t unused = 1u << kW | 1u << kR | 1u << kE0 | 1u << kE1 | 1u << kE2 | 1u << kE3 | 1u << kSlopeA |
                              1u << kSlopeB | 1u << kSlopeD;
  for (int k = 0; k < kColumns; ++k) {
    if ((unused >> k & 1u) && row[k] != 0) return k;
  }
  return kLearnedColumns;
}

DK_HD uint32_t learned_step_terms(const double* row, uint32_t want) {
  const uint32_t terms = step_terms(row, want);
  return (terms & kTermG) && row[kLogVariance1] != 0 ? terms | kTermV : terms;
}

// ln of the standard deviation = s0 + s1 v.
template <class T>
struct LearnedDeviation {
  T s0, s1;
};

template <class T>
DK_HD LearnedDeviation<T> learned_deviation(const double* row) {
  return {static_cast<T>(0.5 * row[kLogVariance0]), static_cast<T>(0.5 * row[kLogVariance1])};
}

// The noise that the step adds g times. v is 0 where it is not at work, so that r0 alone counts.
template <class T>
DK_HD T learned_noise(const LearnedDeviation<T>& k, T v, T z) {
  return mul(exponential(fma(k.s1, v, k.s0)).value, z);
}

namespace cpu {
void learned_step(const LearnedStepArgs& args, int64_t begin, int64_t end);
}
namespace cuda {
int learned_step(const LearnedStepArgs& args, void* stream);
}

}  // namespace dk
