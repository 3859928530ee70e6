// Group normalisation, forward: sums and squares of the blocks of every channel, their merge by a warp a group, then
// the elements. x is read twice, and once more from the cache for the squares of a block.
#include "group_norm.cuh"

namespace dk::cuda {
namespace {

template <class S, bool last>
__global__ void __launch_bounds__(kNormThreads) sums_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  const PartialPlace<last> place(args.problem);
  if (!place.valid) return;  // a whole warp where lanes share a block
  const S* x = static_cast<const S*>(args.x.data) + place.b * args.x.batch_stride + place.offset;
  T sum = T(0);
  int64_t at = 0;
#pragma unroll 4
  for (int64_t i = place.first; i < place.n; i += place.every, at += place.step) sum = add(sum, T(decode(x[at])));
  sum = norm_gather<last>(sum);
  const T mean = div(sum, static_cast<T>(place.n));
  T squares = T(0);
  at = 0;
#pragma unroll 4
  for (int64_t i = place.first; i < place.n; i += place.every, at += place.step) {
    const T d = sub(T(decode(x[at])), mean);
    squares = fma(d, d, squares);
  }
  squares = norm_gather<last>(squares);
  if (last || norm_lane() == 0) {
    T* partial = norm_partial<T>(args, place.b, place.block, place.c);
    partial[0] = sum;
    partial[args.problem.channels] = squares;
  }
}

// Of a channel of this group: its sum, and its squares about the mean of the group.
template <class T>
struct ChannelSum {
  const GroupNormArgs* args;
  int64_t b;
  __device__ __forceinline__ double operator()(int64_t c) const {
    double sum = 0;
    for (int64_t k = 0; k < norm_blocks(args->problem); ++k) {
      sum = add(sum, static_cast<double>(norm_partial<T>(*args, b, k, c)[0]));
    }
    return norm_channel_sum(args->problem, sum, norm_given(args->add, b, c, 0.0, ReadChannel{}));
  }
};

template <class T>
struct ChannelSquares {
  const GroupNormArgs* args;
  int64_t b;
  double mean;
  __device__ __forceinline__ double operator()(int64_t c) const {
    const double center = sub(mean, norm_given(args->add, b, c, 0.0, ReadChannel{}));
    double squares = 0;
    for (int64_t k = 0; k < norm_blocks(args->problem); ++k) {
      const T* partial = norm_partial<T>(*args, b, k, c);
      const double n = static_cast<double>(norm_size(args->problem, k));
      squares = add(squares, norm_block_squares(n, div(1.0, n), static_cast<double>(partial[0]),
                                                static_cast<double>(partial[args->problem.channels]), center));
    }
    return squares;
  }
};

template <class T>
__global__ void __launch_bounds__(kNormThreads) finish_kernel(const GroupNormArgs args) {
  const NormProblem& p = args.problem;
  const int64_t at = norm_warp();
  if (at >= p.batch * p.groups) return;
  const int64_t b = at / p.groups, width = norm_width(p), first = at % p.groups * width, end = first + width;
  const double mean = div(norm_sum(first, end, ChannelSum<T>{&args, b}), norm_count(p));
  const double squares = norm_sum(first, end, ChannelSquares<T>{&args, b, mean});
  const T mean_t = static_cast<T>(mean), rstd = static_cast<T>(norm_rstd(p, squares));
  if (norm_lane() == 0) {
    static_cast<T*>(args.mean)[at] = mean_t;
    static_cast<T*>(args.rstd)[at] = rstd;
  }
  for (int64_t c = first + norm_lane(); c < end; c += kNormLanes) {
    norm_set_affine(norm_factors<T>(args, b) + c, p.channels,
                    norm_affine_of(mean_t, rstd, norm_channel(args, b, c, ReadChannel{})));
  }
}

template <class S, int W, bool active>
__global__ void __launch_bounds__(kNormThreads) apply_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  const ElementPlace<W> place(args.problem);
  if (!place.valid) return;
  const T* factors = norm_factors<T>(args, place.b);
  T v[W];
  load_as<S>(args.x.data, place.b * args.x.batch_stride + place.first, W, v);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    v[j] = norm_value<active>(v[j], norm_factor(args, factors, kNormMean, place.c, j),
                              norm_factor(args, factors, kNormScale, place.c, j),
                              norm_factor(args, factors, kNormOffset, place.c, j));
  }
  store_as<S>(args.out.data, place.b * args.out.batch_stride + place.first, W, v);
}

template <class S, bool active>
int apply(const GroupNormArgs& args, void* stream) {
  return launch_norm_elements<S>(args, {&args.x, &args.out}, stream,
                                 [](auto width) { return apply_kernel<S, decltype(width)::value, active>; });
}

template <class S>
int run(const GroupNormArgs& args, void* stream) {
  const NormProblem& p = args.problem;
  if (p.batch == 0) return cudaSuccess;
  int status = launch_norm_partials(args, stream, [](auto last) { return sums_kernel<S, decltype(last)::value>; });
  if (status != cudaSuccess) return status;
  status = launch_norm(finish_kernel<Arithmetic<S>>, p.batch * p.groups, kNormWarps, stream, args);
  if (status != cudaSuccess) return status;
  return p.silu ? apply<S, true>(args, stream) : apply<S, false>(args, stream);
}

}  // namespace

int group_norm(const GroupNormArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
