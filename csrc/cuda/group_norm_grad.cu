// Group normalisation, backward: the factors of every channel, sums of its blocks, those of its group by a warp, the
// elements, and the samples' sums for weight and bias. What lies between x and y is made again in both passes.
#include "group_norm.cuh"

namespace dk::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kNormThreads) factors_kernel(const GroupNormArgs args) {
  const NormProblem& p = args.problem;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.batch * p.channels) return;
  const int64_t b = index / p.channels, c = index % p.channels, at = b * p.groups + c / norm_width(p);
  norm_set_affine(norm_factors<T>(args, b) + c, p.channels,
                  norm_affine_of(static_cast<const T*>(args.mean)[at], static_cast<const T*>(args.rstd)[at],
                                 norm_channel(args, b, c, ReadChannel{})));
}

template <class S, bool last, bool active>
__global__ void __launch_bounds__(kNormThreads) sums_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  const PartialPlace<last> place(args.problem);
  if (!place.valid) return;  // a whole warp where lanes share a block
  const S* x = static_cast<const S*>(args.x.data) + place.b * args.x.batch_stride + place.offset;
  const S* g = static_cast<const S*>(args.grad_out.data) + place.b * args.grad_out.batch_stride + place.offset;
  const T* factors = norm_factors<T>(args, place.b);
  const T mean = norm_factor(args, factors, kNormMean, place.c, 0);
  const T scale = norm_factor(args, factors, kNormScale, place.c, 0);
  const T offset = norm_factor(args, factors, kNormOffset, place.c, 0);
  const bool added = norm_terms(args) == 3;
  T p = T(0), q = T(0), r = T(0);
  int64_t at = 0;
#pragma unroll 2
  for (int64_t i = place.first; i < place.n; i += place.every, at += place.step) {
    const T v = T(decode(x[at])), gu = norm_gu<active>(T(decode(g[at])), v, mean, scale, offset);
    p = add(p, gu);
    q = fma(gu, sub(v, mean), q);
    if (added) r = add(r, sub(v, mean));
  }
  p = norm_gather<last>(p);
  q = norm_gather<last>(q);
  if (added) r = norm_gather<last>(r);
  if (last || norm_lane() == 0) {
    T* partial = norm_partial<T>(args, place.b, place.block, place.c);
    partial[0] = p;
    partial[args.problem.channels] = q;
    if (added) partial[2 * args.problem.channels] = r;
  }
}

// A P (part 0) or A Q (part 1) of a channel.
struct ChannelPart {
  const GroupNormArgs* args;
  int64_t b;
  int part;
  __device__ __forceinline__ double operator()(int64_t c) const {
    return mul(norm_gain(norm_channel(*args, b, c, ReadChannel{})),
               norm_sums(*args, b, c)[part * args->problem.channels]);
  }
};

// Registers for 4 blocks, 128 a thread: without the bound ptxas spills a few on sm_90 to reach a higher occupancy.
template <class T>
__global__ void __launch_bounds__(kNormThreads, 4) finish_kernel(const GroupNormArgs args) {
  const NormProblem& p = args.problem;
  const int64_t at = norm_warp();
  if (at >= p.batch * p.groups) return;
  const int64_t b = at / p.groups, width = norm_width(p), first = at % p.groups * width, end = first + width;
  const int terms = norm_terms(args);
  const double rstd = static_cast<double>(static_cast<const T*>(args.rstd)[at]);
  for (int64_t c = first + norm_lane(); c < end; c += kNormLanes) {
    for (int term = 0; term < terms; ++term) {
      double sum = 0;
      for (int64_t k = 0; k < norm_blocks(p); ++k) {
        sum = add(sum, static_cast<double>(norm_partial<T>(args, b, k, c)[term * p.channels]));
      }
      norm_sums(args, b, c)[term * p.channels] = term == 1 ? mul(sum, rstd) : sum;
    }
  }
  __syncwarp();  // each lane reads below what it wrote itself; the fence keeps the order
  const double whole_p = norm_sum(first, end, ChannelPart{&args, b, 0});
  const double whole_q = norm_sum(first, end, ChannelPart{&args, b, 1});
  const NormSlopes slopes = norm_slopes(p, rstd, whole_p, whole_q);
  for (int64_t c = first + norm_lane(); c < end; c += kNormLanes) {
    norm_set_slopes(norm_factors<T>(args, b) + c, p.channels, slopes);
    const double *of = norm_sums(args, b, c), sum_p = of[0], sum_q = of[p.channels];
    const NormChannel k = norm_channel(args, b, c, ReadChannel{});
    if (args.d_shift.data != nullptr) write_channel(args.d_shift, b, c, sum_p);
    if (args.d_scale.data != nullptr) write_channel(args.d_scale, b, c, norm_d_scale(k, sum_p, sum_q));
    if (args.d_add.data != nullptr) {
      write_channel(args.d_add, b, c, norm_d_add(p, k, slopes, sum_p, of[2 * p.channels]));
    }
  }
}

template <class S, int W, bool active>
__global__ void __launch_bounds__(kNormThreads) apply_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  const ElementPlace<W> place(args.problem);
  if (!place.valid) return;
  const T* factors = norm_factors<T>(args, place.b);
  T v[W], g[W];
  load_as<S>(args.x.data, place.b * args.x.batch_stride + place.first, W, v);
  load_as<S>(args.grad_out.data, place.b * args.grad_out.batch_stride + place.first, W, g);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const T mean = norm_factor(args, factors, kNormMean, place.c, j);
    const T scale = norm_factor(args, factors, kNormScale, place.c, j);
    const T gu = norm_gu<active>(g[j], v[j], mean, scale, norm_factor(args, factors, kNormOffset, place.c, j));
    v[j] = norm_dx(gu, v[j], mean, scale, norm_factor(args, factors, kNormSlope, place.c, j),
                   norm_factor(args, factors, kNormLevel, place.c, j));
  }
  store_as<S>(args.out.data, place.b * args.out.batch_stride + place.first, W, v);
}

__global__ void __launch_bounds__(kNormThreads) parameters_kernel(const GroupNormArgs args) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= args.problem.channels) return;
  if (args.d_bias.data != nullptr) write_channel(args.d_bias, 0, c, norm_d_parameter(args, c, 0, ReadChannel{}));
  if (args.d_weight.data != nullptr) write_channel(args.d_weight, 0, c, norm_d_parameter(args, c, 1, ReadChannel{}));
}

template <class S, bool active>
int run(const GroupNormArgs& args, void* stream) {
  using T = Arithmetic<S>;
  const NormProblem& p = args.problem;
  if (p.batch == 0) return cudaSuccess;
  int status = launch_norm(factors_kernel<T>, p.batch * p.channels, kNormThreads, stream, args);
  if (status != cudaSuccess) return status;
  status = launch_norm_partials(args, stream, [](auto last) { return sums_kernel<S, decltype(last)::value, active>; });
  if (status != cudaSuccess) return status;
  status = launch_norm(finish_kernel<T>, p.batch * p.groups, kNormWarps, stream, args);
  if (status != cudaSuccess) return status;
  status = launch_norm_elements<S>(args, {&args.x, &args.grad_out, &args.out}, stream,
                                   [](auto width) { return apply_kernel<S, decltype(width)::value, active>; });
  if (status != cudaSuccess || (args.d_weight.data == nullptr && args.d_bias.data == nullptr)) return status;
  return launch_norm(parameters_kernel, p.channels, kNormThreads, stream, args);
}

}  // namespace

int group_norm_grad(const GroupNormArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto s) {
    using S = decltype(s);
    return args.problem.silu ? run<S, true>(args, stream) : run<S, false>(args, stream);
  });
}

}  // namespace dk::cuda
