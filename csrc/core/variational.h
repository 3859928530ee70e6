// The variational bound of a reverse step, the squared error beside it, and both gradients.
//
//   d     = pred - (u x0 + v eps)                   error of the network in its own prediction
//   e     = clamp(x0 + q d, -clip, clip) - x0       error of the x0 that follows from it
//   r     = r0 + r1 w                               ln variance of the model's step - ln variance of the posterior
//   bound = (exp(-r) - 1 + r + k2 e^2 exp(-r)) / 2  KL(q(x_s | x_t, x0) || p(x_s | x_t)), in nats
//         = -ln P(bin of x0 | N(x0 + e, 1 / i^2))   where x_s is the data (inv_std not 0): i = inv_std exp(-r / 2),
//         bins
//                                                   of half width `bin`, the first and the last of [-1, 1] open
//   L_b   = w_squares mean d^2 + w_bound mean bound / ln 2
//
// The noisy x_t drops out: both means hold the same multiple of it. w is the network's second half of channels (learned
// variance), or absent. The bound's gradient reaches d times w_mean (0: stopped, the hybrid loss).
#pragma once

#include "gaussian.h"
#include "noising.h"
#include "ordered_sum.h"

namespace dk {

#define DK_BOUND_COLUMNS(COLUMN)           \
  COLUMN(kBoundU, "u")                     \
  COLUMN(kBoundV, "v")                     \
  COLUMN(kBoundQ, "q")                     \
  COLUMN(kBoundClip, "clip")               \
  COLUMN(kBoundK2, "k2")                   \
  COLUMN(kBoundR0, "r0")                   \
  COLUMN(kBoundR1, "r1")                   \
  COLUMN(kBoundInvStd, "inv_std")          \
  COLUMN(kBoundBin, "bin")                 \
  COLUMN(kBoundSquaresWeight, "w_squares") \
  COLUMN(kBoundWeight, "w_bound")          \
  COLUMN(kBoundMeanWeight, "w_mean")
enum VariationalColumn : int { DK_BOUND_COLUMNS(DK_COLUMN_NUMBER) kBoundColumns };

struct VariationalArgs {
  Space space;
  View pred, w, x0, noise, grad, grad_w;  // w: second half of the channels, may be absent; grad, grad_w as pred, w
  Rows rows;
  Seeds seeds;
  uint64_t stream;
  Reduction reduction;
  void* partials;  // [batch, sum_blocks(count), 2] float32 (float64 if x0 is): squares and nats
  void* value;     // [batch], or [1] after a reduction over the batch
  void* means;     // [batch, 2]: mean d^2, mean bound in bits
  void* samples;   // [batch] workspace of that reduction
};

template <class T>
struct VariationalCoefficients {
  T u, v, q, clip, k2, r0, r1, inv_std, bin;
  T squares, bits;  // what the sums of d^2 and of nats are multiplied by for the means; bits: over ln 2
  T weighted_squares, weighted_bits;      // the same for L, averaged over the batch
  T gradient, gradient_mean, gradient_r;  // of L: per d, per d of the bound, per r of the bound
  bool decodes;
};

// `count` = elements of a sample, `batch` = samples that the result is averaged over (1: no average).
template <class T>
DK_HD VariationalCoefficients<T> variational_coefficients(const double* row, int64_t count, int64_t batch) {
  constexpr double kInvLn2 = 1.4426950408889634;
  const double each = 1.0 / static_cast<double>(count), all = each / static_cast<double>(batch);
  const double squares = row[kBoundSquaresWeight] * all, bound = row[kBoundWeight] * kInvLn2 * all;
  VariationalCoefficients<T> k;
  k.u = static_cast<T>(row[kBoundU]);
  k.v = static_cast<T>(row[kBoundV]);
  k.q = static_cast<T>(row[kBoundQ]);
  k.clip = static_cast<T>(row[kBoundClip]);
  k.k2 = static_cast<T>(row[kBoundK2]);
  k.r0 = static_cast<T>(row[kBoundR0]);
  k.r1 = static_cast<T>(row[kBoundR1]);
  k.inv_std = static_cast<T>(row[kBoundInvStd]);
  k.bin = static_cast<T>(row[kBoundBin]);
  k.squares = static_cast<T>(each);
  k.bits = static_cast<T>(kInvLn2 * each);
  k.weighted_squares = static_cast<T>(squares);
  k.weighted_bits = static_cast<T>(bound);
  k.gradient = static_cast<T>(2 * squares);
  k.gradient_mean = static_cast<T>(bound * row[kBoundMeanWeight] * row[kBoundQ]);
  k.gradient_r = static_cast<T>(bound * row[kBoundR1]);
  k.decodes = row[kBoundInvStd] != 0;
  return k;
}

// A bound in nats and its derivatives.
template <class T>
struct Bound {
  T nats, by_e, by_r;
};

template <class T>
DK_HD Bound<T> gaussian_kl(T k2, T e, T r) {
  const Exponential<T> inverse = exponential(-r);
  const T slope = mul(mul(k2, e), inverse.value), distance = mul(slope, e);
  return {mul(T(0.5), add(inverse.minus_1_t, distance)), slope, mul(T(-0.5), add(inverse.minus_1, distance))};
}

// -ln P(bin) and its derivatives where the bin is narrow: the midpoint rule with corrections in w^2, for a distance c
// and a width w in standard deviations.
template <class T>
DK_HD Bound<T> narrow_bin(T c, T w) {
  const T a = mul(w, w), s = mul(c, c);
  const T p1 = sub(s, T(1)), p2 = fma(sub(s, T(6)), s, T(3)), p3 = fma(fma(sub(s, T(15)), s, T(45)), s, T(-15));
  const T k1 = mul(a, T(1.0 / 24)), k2 = mul(mul(a, a), T(1.0 / 1920)), k3 = mul(mul(mul(a, a), a), T(1.0 / 322560));
  const T sum = fma(k3, p3, fma(k2, p2, mul(k1, p1)));
  const T by_c = mul(c, fma(k3, fma(fma(T(6), s, T(-60)), s, T(90)), fma(k2, fma(T(4), s, T(-12)), mul(T(2), k1))));
  const T by_w = fma(mul(T(6), k3), p3, fma(mul(T(4), k2), p2, mul(mul(T(2), k1), p1)));  // w d sum / dw
  const T whole = add(T(1), sum);
  const T nats = sub(fma(T(0.5), s, static_cast<T>(kHalfLn2Pi)), add(log_positive(w), log_1p(sum)));
  const T scaled = div(fma(c, by_c, by_w), whole);
  return {nats, sub(c, div(by_c, whole)), mul(T(0.5), add(sub(T(1), s), scaled))};
}

// The same for any other width, from the tails beyond the near (lo) and the far edge (hi) of the bin.
template <class T>
DK_HD Bound<T> wide_bin(T c, T half) {
  const T lo = sub(c, half), hi = add(c, half);
  const bool inside = lo < T(0);  // the mean lies in the bin
  const T near = tail(inside ? -lo : lo), far = tail(hi);
  const T square = mul(mul(T(0.5), lo), lo);
  const Exponential<T> ratio = exponential(mul(mul(T(-2), c), half));  // density at hi over density at lo
  const T height = inside ? exponential(-square).value : T(1);
  const T outside = mul(height, fma(ratio.value, far, near));
  const T mass = inside ? sub(T(1), outside) : sub(near, mul(ratio.value, far));  // without exp(-square) beyond lo
  const T nats = inside ? -log_1p(-outside) : sub(square, log_positive(mass));
  const T density = div(mul(static_cast<T>(kInvSqrt2Pi), height), mass);
  return {nats, mul(density, -ratio.minus_1), mul(mul(T(0.5), density), fma(hi, ratio.value, -lo))};
}

// -ln Q(a) of the open bins.
template <class T>
DK_HD Bound<T> open_bin(T a) {
  const bool inside = a < T(0);
  const T beyond = tail(inside ? -a : a), square = mul(mul(T(0.5), a), a);
  const T height = inside ? exponential(-square).value : T(1), outside = mul(height, beyond);
  const T nats = inside ? -log_1p(-outside) : sub(square, log_positive(beyond));
  const T mass = inside ? sub(T(1), outside) : beyond;
  const T hazard = div(mul(static_cast<T>(kInvSqrt2Pi), height), mass);
  return {nats, hazard, mul(mul(T(-0.5), a), hazard)};
}

template <class T>
constexpr T kNarrow = sizeof(T) == 4 ? T(0.5) : T(0.05);  // where narrow_bin is as good as wide_bin

template <class T>
DK_HD Bound<T> decoder(const VariationalCoefficients<T>& k, T x0, T e, T r) {
  const T i = mul(k.inv_std, exponential(mul(T(-0.5), r)).value), half = mul(k.bin, i);
  const T c = mul(e < T(0) ? -e : e, i), w = mul(T(2), half);
  const bool first = x0 < sub(k.bin, T(1));
  const bool last = x0 > sub(T(1), k.bin), open = first || last;
  const T sign = first ? T(1) : last ? T(-1) : e < T(0) ? T(-1) : T(1);
  Bound<T> bound = w <= kNarrow<T> && mul(c, w) <= kNarrow<T> ? narrow_bin(c, w) : wide_bin(c, half);
  if (open) bound = open_bin(sub(mul(mul(sign, e), i), half));
  return {bound.nats, mul(mul(sign, i), bound.by_e), bound.by_r};
}

// One element: d^2, the bound, and the gradients of L with respect to both halves of the prediction.
template <class T>
struct VariationalElement {
  T square, nats, by_pred, by_w;
};

template <bool decodes, class T>
DK_HD VariationalElement<T> variational_element(const VariationalCoefficients<T>& k, T pred, T w, T x0, T eps) {
  const T d = sub(pred, affine(k.u, x0, k.v, eps)), change = mul(k.q, d), free = add(x0, change);
  const T above = free < -k.clip ? -k.clip : free, clean = above > k.clip ? k.clip : above;
  const bool inside = clean == free;
  const T e = inside ? change : sub(clean, x0), r = fma(k.r1, w, k.r0);
  const Bound<T> bound = decodes ? decoder(k, x0, e, r) : gaussian_kl(k.k2, e, r);
  const T through = inside && k.gradient_mean != T(0) ? mul(k.gradient_mean, bound.by_e) : T(0);
  return {mul(d, d), bound.nats, fma(k.gradient, d, through), mul(k.gradient_r, bound.by_r)};
}

// L of a sample from its sums; a weight of 0 drops its term, whatever the sum.
template <class T>
DK_HD T weighted_bound(const VariationalCoefficients<T>& k, T squares, T nats) {
  const T first = k.weighted_squares != T(0) ? mul(k.weighted_squares, squares) : T(0);
  return k.weighted_bits != T(0) ? fma(k.weighted_bits, nats, first) : first;
}

namespace cpu {
void variational(const VariationalArgs& args, int64_t begin, int64_t end);
void variational_finish(const VariationalArgs& args);
}  // namespace cpu
namespace cuda {
int variational(const VariationalArgs& args, void* stream);
}

}  // namespace dk
