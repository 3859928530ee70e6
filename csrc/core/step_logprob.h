// ln of the density with which a sampler step makes a given next state, and its gradient with respect to the network
// (docs: diffkern.ops.step_logprob).
//
//   mean  = the x' of the row (core/step.h) without g z
//   std_i = g, or g exp((r0 + r1 v_i) / 2) for a learned variance (core/learned_step.h)
//   L_b   = sum_i -(after_i - mean_i)^2 / (2 std_i^2) - ln std_i - ln(2 pi) / 2
//
// What the elements have in common leaves the sum: with base = g exp(r0 / 2), t = r1 v, a power of two `scale` near
// 1 / base and variance = (base scale)^2,
//
//   L_b = -N (ln base + ln(2 pi) / 2) - sum_i energy_i / (2 variance)
//   energy = (scale (after - mean))^2 exp(-t) + variance t
//
// where all but the energies is float64: float32 rounds each element's own deviation, and nothing systematically.
// g = 0 is a step without randomness: L_b = 0, gradient 0, nothing is read. The energies are added in the order
// of ordered_sum.h.
#pragma once

#include "learned_step.h"
#include "ordered_sum.h"

namespace dk {

struct StepLogprobArgs {
  Space space;
  View after, x, u, c, v, h[kHistories];  // all but after may be absent; v: the second half of the channels
  View grad_u, grad_c, grad_v;            // gradients of L; absent where not asked for
  bool learned;                           // rows have kLearnedColumns columns, else kColumns
  Dtype state;                            // of after, x, h
  Rows rows;
  double row[kLearnedColumns];  // the row, if rows.table is nullptr
  void* partials;               // [batch, sum_blocks(count)] float32 (float64 if the state is)
  void* value;                  // [batch] of the same dtype
};

// Columns of a row; r0 and r1 come behind those of the step.
DK_HD int logprob_columns(bool learned) { return kColumns + (learned ? 2 : 0); }
static_assert(kLearnedColumns == kColumns + 2, "a learned row ends in r0 and r1");

// A row as the kernels use it.
template <class T>
struct LogprobRow {
  StepCoefficients<T> step;
  uint32_t terms;  // of the mean; none where g = 0
  bool random;     // g is not 0
  T scale, variance, r1;
  T by_m, by_m_clipped;   // gradient per weighted distance: where x0 lies inside the clip, and outside
  T by_square, by_v;      // gradient with respect to v: by_v + by_square times the square
  double half_precision;  // what the sum of energies is multiplied by
  double constant;        // L of a sample without deviations
};

// `count` = elements of a sample.
template <class T>
DK_HD void logprob_row(const double* row, bool learned, int64_t count, LogprobRow<T>& k) {
  constexpr double kSmallest = 2.2250738585072014e-308;  // a g below is as good as 0
  k = {};
  const double g = row[kG] < 0 ? -row[kG] : row[kG];
  k.random = !(g < kSmallest);
  if (!k.random) return;
  const double half_r0 = learned ? mul(0.5, row[kLogVariance0]) : 0.0, r1 = learned ? row[kLogVariance1] : 0.0;
  const double base = learned ? mul(g, exponential(half_r0).value) : g;
  const double log_base = add(log_positive(g), half_r0);
  // 2^-e for the exponent e of the base, kept where float32 has normal numbers.
  const int64_t exponent = static_cast<int64_t>((double_bits(base) >> 52) & 0x7ffu) - 1023;
  const int64_t e = exponent < -120 ? -120 : exponent > 120 ? 120 : exponent;
  const double scale = bits_double(static_cast<uint64_t>(1023 - e) << 52), scaled = mul(base, scale);
  const double variance = mul(scaled, scaled), per_distance = div(scale, variance);
  const double through = mul(row[kB], row[kQ]);
  k.step = step_coefficients<T>(row);
  k.terms = step_terms(row, 0) & ~static_cast<uint32_t>(kTermG);
  k.scale = static_cast<T>(scale);
  k.variance = static_cast<T>(variance);
  k.r1 = static_cast<T>(r1);
  k.by_m = static_cast<T>(mul(add(row[kD], through), per_distance));
  k.by_m_clipped = (k.terms & kTermClip) ? static_cast<T>(mul(row[kD], per_distance)) : k.by_m;
  k.by_square = static_cast<T>(div(mul(0.5, r1), variance));
  k.by_v = static_cast<T>(mul(-0.5, r1));
  k.half_precision = div(0.5, variance);
  k.constant = mul(static_cast<double>(-count), add(log_base, kHalfLn2Pi));
}

// A row whose density is not this Gaussian: its x0 holds noise as well, or learned_step cannot run it.
DK_HD bool logprob_excludes(const double* row, bool learned) {
  if (row[kR] != 0 || row[kG] - row[kG] != 0) return true;
  return learned && learned_step_excess(row) != kLearnedColumns;
}

// One element: its energy, and the gradients of L with respect to m and v.
template <class T>
struct LogprobElement {
  T energy, by_m, by_v;
};

template <bool learned, class T>
DK_HD LogprobElement<T> logprob_element(const LogprobRow<T>& k, T after, T mean, T x0, T v) {
  const T distance = mul(k.scale, sub(after, mean));
  const T by_distance = x0 > -k.step.clip && x0 < k.step.clip ? k.by_m : k.by_m_clipped;
  if (!learned) return {mul(distance, distance), mul(distance, by_distance), T(0)};
  const T t = mul(k.r1, v), weighted = mul(distance, exponential(-t).value), square = mul(distance, weighted);
  return {fma(k.variance, t, square), mul(weighted, by_distance), fma(k.by_square, square, k.by_v)};
}

// Gradients of u and c in m = u + w (c - u) from that of m.
template <class T>
struct GuidedGradient {
  T u, c;
};

template <class T>
DK_HD GuidedGradient<T> guided_gradient(const LogprobRow<T>& k, T by_m) {
  const T c = pick(k.terms & kTermW, mul(k.step.w, by_m), T(0));
  return {sub(by_m, c), c};
}

// L of a sample from its sum of energies.
template <class T>
DK_HD T logprob_value(const LogprobRow<T>& k, T energies) {
  if (!k.random) return T(0);
  return static_cast<T>(sub(k.constant, mul(k.half_precision, static_cast<double>(energies))));
}

namespace cpu {
void step_logprob(const StepLogprobArgs& args, int64_t begin, int64_t end);
void step_logprob_finish(const StepLogprobArgs& args);
}  // namespace cpu
namespace cuda {
int step_logprob(const StepLogprobArgs& args, void* stream);  // partial sums, then the samples
}

}  // namespace dk
