// Group normalisation, a modulation of each sample and SiLU, in one op (Wu & He 2018; adaptive: Dhariwal & Nichol
// 2021).
//
//   x_hat = (x - mean_g) rstd_g,  rstd = 1 / sqrt(var + eps)    over each (sample, group), biased variance
//   u     = (x_hat weight + bias) (1 + scale) + shift           weight, bias of a channel; scale, shift of its sample
//   y     = u sigmoid(u), or u
//
// For the kernels u = a (x - mean) + b, with a and b of each (sample, channel). Backward, with gu = gy y'(u) and the
// sums P = sum gu, Q = sum gu x_hat over the positions of a (sample, channel):
//
//   d shift = P,  d scale = weight Q + bias P,  d bias = sum_b (1 + scale) P,  d weight = sum_b (1 + scale) Q
//   d x     = rstd (gu A - sum_g A P / n - x_hat sum_g A Q / n),  A = weight (1 + scale), n elements of a group
//
// Sums have one order, whatever the threads, the grid or the batch. The positions of a channel are cut into blocks. In
// a contiguous sample a block of kNormRun positions is summed by kNormLanes lanes (lane j takes positions j,
// j + kNormLanes, ... in turn) and folded (lane + 16, ..., + 1); in a channels_last sample a block has kNormRows
// positions, summed one after the other. A block gives its sum and, from its own mean, the sum of squares, so that x is
// read once and a mean far from 0 costs no digits. The blocks of a group are merged in float64, as Chan et al. 1983 do,
// again by lanes: block k of the group's channel c is item k (channels of a group) + c.
#pragma once

#include "args.h"
#include "silu.h"

namespace dk {

constexpr int kNormLanes = 32;
constexpr int64_t kNormRun = 1024;
constexpr int64_t kNormRows = 64;

// weight and bias: [C], batch_stride 0; scale and shift: [B, C]. data == nullptr: absent.
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
  ChannelView weight, bias, scale, shift;
  void* mean;      // [B, G] of T
  void* rstd;      // [B, G] of T
  void* partials;  // [B, blocks, C, 2] of T: sum and squares of a block, or its sums of gu and gu (x - mean)
  void* factors;   // [B, kNormFactors, C] of T

  // Of the gradient.
  View grad_out;
  ChannelView d_weight, d_bias, d_scale, d_shift;
  double* sums;  // [B, C, 2]: P and Q
};

// Rows of `factors`: u = kScale (x - kMean) + kOffset; d x = kScale gu + kSlope (x - kMean) + kLevel.
enum NormFactor : int { kNormMean, kNormScale, kNormOffset, kNormSlope, kNormLevel, kNormFactors };

DK_HD int64_t norm_block(const NormProblem& p) { return p.channels_last ? kNormRows : kNormRun; }
DK_HD int64_t norm_blocks(const NormProblem& p) { return (p.positions + norm_block(p) - 1) / norm_block(p); }
DK_HD int64_t norm_width(const NormProblem& p) { return p.channels / p.groups; }  // channels of a group

// Positions of a block.
DK_HD int64_t norm_size(const NormProblem& p, int64_t block) {
  const int64_t left = p.positions - block * norm_block(p);
  return left < norm_block(p) ? left : norm_block(p);
}

template <class T>
DK_HD T* norm_partial(const GroupNormArgs& args, int64_t b, int64_t block, int64_t c) {
  return static_cast<T*>(args.partials) + ((b * norm_blocks(args.problem) + block) * args.problem.channels + c) * 2;
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

// --------------------------------------------------------------------------------------------------- a group
// What the lanes add up over the items of a group: block `item / width` of its channel `item % width`.
template <class T>
struct NormSums {
  const GroupNormArgs* args;
  int64_t b, first;  // first channel of the group
  DK_HD double at(int64_t block, int64_t c) const { return norm_partial<T>(*args, b, block, first + c)[0]; }
};

template <class T>
struct NormSquares {
  const GroupNormArgs* args;
  int64_t b, first;
  double mean;
  DK_HD double at(int64_t block, int64_t c) const {
    const T* partial = norm_partial<T>(*args, b, block, first + c);
    const double n = static_cast<double>(norm_size(args->problem, block));
    const double apart = sub(div(static_cast<double>(partial[0]), n), mean);
    return fma(mul(n, apart), apart, static_cast<double>(partial[1]));
  }
};

DK_HD double norm_count(const NormProblem& p) { return static_cast<double>(norm_width(p) * p.positions); }

DK_HD double norm_rstd(double squares, double count, double eps) {
  return div(1.0, sqrt(add(div(squares, count), eps)));
}

// --------------------------------------------------------------------------------------------------- a channel
// weight, bias, 1 + scale and shift of a (sample, channel); read(view, b, c) gives a double where there is data.
struct NormChannel {
  double weight, bias, gain, shift;
};

template <class Read>
DK_HD NormChannel norm_channel(const GroupNormArgs& args, int64_t b, int64_t c, const Read& read) {
  return {args.weight.data != nullptr ? read(args.weight, b, c) : 1.0,
          args.bias.data != nullptr ? read(args.bias, b, c) : 0.0,
          args.scale.data != nullptr ? add(1.0, read(args.scale, b, c)) : 1.0,
          args.shift.data != nullptr ? read(args.shift, b, c) : 0.0};
}

template <class T>
DK_HD void norm_set_factors(const GroupNormArgs& args, int64_t b, int64_t c, T mean, T rstd, const NormChannel& k) {
  const int64_t channels = args.problem.channels;
  T* factors = norm_factors<T>(args, b) + c;
  factors[kNormMean * channels] = mean;
  factors[kNormScale * channels] = static_cast<T>(mul(mul(static_cast<double>(rstd), k.weight), k.gain));
  factors[kNormOffset * channels] = static_cast<T>(fma(k.bias, k.gain, k.shift));
}

// P and Q of a channel, from its blocks one after the other.
template <class T>
DK_HD void norm_set_sums(const GroupNormArgs& args, int64_t b, int64_t c, T rstd) {
  double p = 0, q = 0;
  for (int64_t block = 0; block < norm_blocks(args.problem); ++block) {
    const T* partial = norm_partial<T>(args, b, block, c);
    p = add(p, static_cast<double>(partial[0]));
    q = add(q, static_cast<double>(partial[1]));
  }
  double* sums = args.sums + (b * args.problem.channels + c) * 2;
  sums[0] = p;
  sums[1] = mul(q, static_cast<double>(rstd));
}

// The sums over the channels of a group of A P (part 0) and A Q (part 1): items of one block.
template <class Read>
struct NormGroupSums {
  const GroupNormArgs* args;
  int64_t b, first;
  int part;
  Read read;
  DK_HD double at(int64_t, int64_t c) const {
    const NormChannel k = norm_channel(*args, b, first + c, read);
    return mul(mul(k.weight, k.gain), args->sums[(b * args->problem.channels + first + c) * 2 + part]);
  }
};

// The gradient of x from the sums of its group.
template <class T>
DK_HD void norm_set_slopes(const GroupNormArgs& args, int64_t b, int64_t c, double rstd, double p, double q) {
  const int64_t channels = args.problem.channels;
  const double count = norm_count(args.problem);
  T* factors = norm_factors<T>(args, b) + c;
  factors[kNormSlope * channels] = static_cast<T>(-mul(mul(rstd, rstd), div(q, count)));
  factors[kNormLevel * channels] = static_cast<T>(-mul(rstd, div(p, count)));
}

// d scale of a (sample, channel).
DK_HD double norm_d_scale(const NormChannel& k, const double* sums) {
  return fma(k.weight, sums[1], mul(k.bias, sums[0]));
}

// d bias (part 0) or d weight (part 1) of a channel: the samples one after the other.
template <class Read>
DK_HD double norm_d_parameter(const GroupNormArgs& args, int64_t c, int part, const Read& read) {
  double sum = 0;
  for (int64_t b = 0; b < args.problem.batch; ++b) {
    const double gain = args.scale.data != nullptr ? add(1.0, read(args.scale, b, c)) : 1.0;
    sum = fma(gain, args.sums[(b * args.problem.channels + c) * 2 + part], sum);
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
