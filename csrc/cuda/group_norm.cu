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
    partial[1] = squares;
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) finish_kernel(const GroupNormArgs args) {
  const NormProblem& p = args.problem;
  const int64_t at = norm_warp();
  if (at >= p.batch * p.groups) return;
  const int64_t b = at / p.groups, g = at % p.groups, width = norm_width(p), blocks = norm_blocks(p);
  const double count = norm_count(p);
  const double mean = div(norm_sum(blocks, width, NormSums<T, ReadChannel>{&args, b, g * width, {}}), count);
  const double squares = norm_sum(blocks, width, NormSquares<T, ReadChannel>{&args, b, g * width, {}, mean});
  const T mean_t = static_cast<T>(mean), rstd = static_cast<T>(norm_rstd(squares, count, p.eps));
  if (norm_lane() == 0) {
    static_cast<T*>(args.mean)[at] = mean_t;
    static_cast<T*>(args.rstd)[at] = rstd;
  }
  for (int64_t c = g * width + norm_lane(); c < (g + 1) * width; c += kNormLanes) {
    norm_set_factors(args, b, c, mean_t, rstd, norm_channel(args, b, c, ReadChannel{}));
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
