// Group normalisation, a modulation of each sample and SiLU, in one op (Wu & He 2018; adaptive: Dhariwal & Nichol
// 2021).
//
//   h     = x + add                                             add, scale and shift of a channel of a sample
//   x_hat = (h - mean_g) rstd_g,  rstd = 1 / sqrt(var + eps)    over each (sample, group), biased variance
//   u     = (x_hat weight + bias) (1 + scale) + shift           weight, bias of a channel
//   y     = u sigmoid(u), or u
//
// For the kernels u = a (x - m) + b, with m = mean - add, a and b of each (sample, channel): no element knows of `add`.
// Backward, with gu = gy y'(u) and the sums P = sum gu, Q = sum gu x_hat, R = sum (x - m) over the positions of a
// (sample, channel):
//
//   d shift = P,  d scale = weight Q + bias P,  d bias = sum_b (1 + scale) P,  d weight = sum_b (1 + scale) Q
//   d x     = rstd (gu A - sum_g A P / n - x_hat sum_g A Q / n),  A = weight (1 + scale), n elements of a group
//   d add   = sum d x over the positions, which P and R give
//
// Sums have one order, whatever the threads, the grid or the batch. The positions of a channel are cut into blocks. In
// a contiguous sample a block of kNormRun positions is summed by kNormLanes lanes (lane j takes positions j,
// j + kNormLanes, ... in turn) and folded (lane + 16, ..., + 1); in a channels_last sample a block has kNormRows
// positions, summed one after the other. A block gives its sum and, from its own mean, the sum of squares, so that x is
// read once and a mean far from 0 costs no digits. They are merged in float64, as Chan et al. 1983 do: the blocks of a
// channel one after the other, then the channels of a group by lanes.
#pragma once

#include "args.h"
#include "silu.h"

namespace dk {

constexpr int kNormLanes = 32;
constexpr int64_t kNormRun = 1024;
constexpr int64_t kNormRows = 64;
constexpr int kNormSums = 5;

// weight and bias: [C], batch_stride 0; scale, shift and add: [B, C]. data == nullptr: absent.
struct ChannelView {
  void* data;
  Dtype dtype;
  int64_t batch_stride, stride;
};

struct NormProblem {
  int64_t batch, channels, positions, groups;
  bool channels_last;  // position p, channel c at p C + c; else c positions + p
  bool silu;
  double eps;
};

// T is float32 (float64 if x is).
struct GroupNormArgs {
  NormProblem problem;
  View x, out;  // out: y, or the gradient of x
  ChannelView weight, bias, scale, shift, add;
  void* mean;      // [B, G] of T
  void* rstd;      // [B, G] of T
  void* partials;  // [B, blocks, terms, C] of T: sum and squares of a block, or its sums of gu, gu (x - m), (x - m)
  void* factors;   // [B, kNormFactors, C] of T
  double* sums;    // [B, kNormSums, C]: P, Q and R, and what is merged on the way

  // Of the gradient.
  View grad_out;
  ChannelView d_weight, d_bias, d_scale, d_shift, d_add;
};

// Rows of `factors`: u = kScale (x - kMean) + kOffset; d x = kScale gu + kSlope (x - kMean) + kLevel.
enum NormFactor : int { kNormMean, kNormScale, kNormOffset, kNormSlope, kNormLevel, kNormFactors };

DK_HD int64_t norm_block(const NormProblem& p) { return p.channels_last ? kNormRows : kNormRun; }
DK_HD int64_t norm_blocks(const NormProblem& p) { return (p.positions + norm_block(p) - 1) / norm_block(p); }
DK_HD int64_t norm_width(const NormProblem& p) { return p.channels / p.groups; }  // channels of a group

DK_HD double norm_count(const NormProblem& p) { return static_cast<double>(norm_width(p) * p.positions); }

// Positions of a block.
DK_HD int64_t norm_size(const NormProblem& p, int64_t block) {
  const int64_t left = p.positions - block * norm_block(p);
  return left < norm_block(p) ? left : norm_block(p);
}

// Terms of a partial and of a channel's sums, C apart; the third, R, is made where the gradient of `add` is.
DK_HD int norm_terms(const GroupNormArgs& args) { return args.d_add.data != nullptr ? 3 : 2; }

template <class T>
DK_HD T* norm_partial(const GroupNormArgs& args, int64_t b, int64_t block, int64_t c) {
  return static_cast<T*>(args.partials) +
         (b * norm_blocks(args.problem) + block) * norm_terms(args) * args.problem.channels + c;
}

DK_HD double* norm_sums(const GroupNormArgs& args, int64_t b, int64_t c) {
  return args.sums + b * kNormSums * args.problem.channels + c;
}

template <class T>
DK_HD T* norm_factors(const GroupNormArgs& args, int64_t b) {
  return static_cast<T*>(args.factors) + b * kNormFactors * args.problem.channels;
}

// -------------------------------------------------------------------------------------------------- an element
template <class T>
DK_HD T norm_affine(T x, T mean, T scale, T offset) {
  return fma(sub(x, mean), scale, offset);
}

template <bool active, class T>
DK_HD T norm_value(T x, T mean, T scale, T offset) {
  const T u = norm_affine(x, mean, scale, offset);
  return active ? silu(u) : u;
}

template <bool active, class T>
DK_HD T norm_gu(T grad, T x, T mean, T scale, T offset) {
  return active ? mul(grad, silu_slope(norm_affine(x, mean, scale, offset))) : grad;
}

template <class T>
DK_HD T norm_dx(T gu, T x, T mean, T scale, T slope, T level) {
  return fma(gu, scale, fma(sub(x, mean), slope, level));
}

// ------------------------------------------------------------------------------------------------- a channel
// A number of a (sample, channel), or `absent`; read(view, b, c) gives a double where there is data.
template <class Read>
DK_HD double norm_given(const ChannelView& view, int64_t b, int64_t c, double absent, const Read& read) {
  return view.data != nullptr ? read(view, b, c) : absent;
}

// weight, bias, 1 + scale, shift and add of a (sample, channel).
struct NormChannel {
  double weight, bias, gain, shift, added;
};

template <class Read>
DK_HD NormChannel norm_channel(const GroupNormArgs& args, int64_t b, int64_t c, const Read& read) {
  return {norm_given(args.weight, b, c, 1.0, read), norm_given(args.bias, b, c, 0.0, read),
          add(1.0, norm_given(args.scale, b, c, 0.0, read)), norm_given(args.shift, b, c, 0.0, read),
          norm_given(args.add, b, c, 0.0, read)};
}

// A = weight (1 + scale)
DK_HD double norm_gain(const NormChannel& k) { return mul(k.weight, k.gain); }

// Sum of a channel of x + add from that of x.
DK_HD double norm_channel_sum(const NormProblem& p, double sum, double added) {
  return fma(static_cast<double>(p.positions), added, sum);
}

// The squares of a block about `center`, from its sum and those about its own mean; `inverse` is 1 / n.
DK_HD double norm_block_squares(double n, double inverse, double sum, double squares, double center) {
  const double apart = fma(sum, inverse, -center);
  return fma(mul(n, apart), apart, squares);
}

DK_HD double norm_rstd(const NormProblem& p, double squares) {
  return div(1.0, sqrt(add(div(squares, norm_count(p)), p.eps)));
}

// What u = kScale (x - kMean) + kOffset needs.
template <class T>
struct NormAffine {
  T mean, scale, offset;
};

template <class T>
DK_HD NormAffine<T> norm_affine_of(T mean, T rstd, const NormChannel& k) {
  return {static_cast<T>(sub(static_cast<double>(mean), k.added)),
          static_cast<T>(mul(static_cast<double>(rstd), norm_gain(k))), static_cast<T>(fma(k.bias, k.gain, k.shift))};
}

template <class T>
DK_HD void norm_set_affine(T* factors, int64_t channels, const NormAffine<T>& affine) {
  factors[kNormMean * channels] = affine.mean;
  factors[kNormScale * channels] = affine.scale;
  factors[kNormOffset * channels] = affine.offset;
}

// ------------------------------------------------------------------------------------------------ the gradient
// The gradient of x from the sums of its group: d x = rstd A gu + slope (x - m) + level.
struct NormSlopes {
  double rstd, slope, level;
};

DK_HD NormSlopes norm_slopes(const NormProblem& problem, double rstd, double p, double q) {
  const double count = norm_count(problem);
  return {rstd, -mul(mul(rstd, rstd), div(q, count)), -mul(rstd, div(p, count))};
}

template <class T>
DK_HD void norm_set_slopes(T* factors, int64_t channels, const NormSlopes& slopes) {
  factors[kNormSlope * channels] = static_cast<T>(slopes.slope);
  factors[kNormLevel * channels] = static_cast<T>(slopes.level);
}

// Of a (sample, channel), from its sums P, Q and R.
DK_HD double norm_d_scale(const NormChannel& k, double p, double q) { return fma(k.weight, q, mul(k.bias, p)); }

DK_HD double norm_d_add(const NormProblem& problem, const NormChannel& k, const NormSlopes& slopes, double p,
                        double r) {
  const double level = mul(static_cast<double>(problem.positions), slopes.level);
  return fma(mul(slopes.rstd, norm_gain(k)), p, fma(slopes.slope, r, level));
}

// d bias (part 0) or d weight (part 1) of a channel: the samples one after the other.
template <class Read>
DK_HD double norm_d_parameter(const GroupNormArgs& args, int64_t c, int part, const Read& read) {
  double sum = 0;
  for (int64_t b = 0; b < args.problem.batch; ++b) {
    const double gain = add(1.0, norm_given(args.scale, b, c, 0.0, read));
    sum = fma(gain, norm_sums(args, b, c)[part * args.problem.channels], sum);
  }
  return sum;
}

namespace cpu {
int64_t group_norm_phases(const NormProblem& problem);
int64_t group_norm_tasks(const NormProblem& problem, int64_t phase);
void group_norm(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end);
int64_t group_norm_grad_phases(const NormProblem& problem);
int64_t group_norm_grad_tasks(const NormProblem& problem, int64_t phase);
void group_norm_grad(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int group_norm(const GroupNormArgs& args, void* stream);
int group_norm_grad(const GroupNormArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
