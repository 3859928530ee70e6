// Mean and standard deviation: twice a partial sum a block of threads and an ordered sum a sample (core/ordered_sum.h).
#include "../core/moments.h"
#include "ordered_sum.cuh"

namespace dk::cuda {
namespace {

template <class S, Access access, bool squares>
__global__ void __launch_bounds__(kSumThreads<S, access>, kMinBlocks) sums_kernel(const MomentsArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) T terms[kSumBlock];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSumBlock;
  const T mean = squares ? static_cast<const T*>(args.value)[2 * b] : T(0);
#pragma unroll 1
  for (int k = 0; k < kHeld<S, access>; ++k) {
    const int local = (k * kSumThreads<S, access> + static_cast<int>(threadIdx.x)) * W;
    const Place<access> place(args.space, b, begin + local, W);
    T x[W] = {};
    if (place.n > 0) load_state<S>(args.x, place, x);
#pragma unroll
    for (int j = 0; j < W; ++j) x[j] = j < place.n ? (squares ? square_from(x[j], mean) : x[j]) : T(0);
    store_squares(terms, local, x);
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const T sum = fold_warp(fold<kSumBlock, 32>(terms + threadIdx.x));
    if (threadIdx.x == 0) static_cast<T*>(args.partials)[b * gridDim.x + blockIdx.x] = sum;
  }
}

template <class T, bool squares>
__global__ void __launch_bounds__(kSumLanes) finish_kernel(const MomentsArgs args) {
  __shared__ T lanes[kSumLanes];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t count = args.space.count, blocks = sum_blocks(count);
  const T sum = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks, lanes);
  if (threadIdx.x == 0) {
    static_cast<T*>(args.value)[2 * b + (squares ? 1 : 0)] = squares ? deviation_of(sum, count) : mean_of(sum, count);
  }
}

template <class S, bool squares>
int run_pass(Access access, const MomentsArgs& args, void* stream) {
  int status = cudaSuccess;
  if (args.space.count > 0) {
    // A sum of 1024 elements is of memory order: chunks of a quad or of two doubles serve alike.
    status = launch_partials<S, false>(args.space, access, stream, args,
                                       [](auto way) { return sums_kernel<S, decltype(way)::value, squares>; });
  }
  if (status != cudaSuccess) return status;
  return launch_samples(finish_kernel<Arithmetic<S>, squares>, args.space.batch, stream, args);
}

template <class S>
int run(const MomentsArgs& args, void* stream) {
  if (args.space.batch == 0) return cudaSuccess;
  const Access access = choose_access<S>(args.space, false, args.x);
  const int status = run_pass<S, false>(access, args, stream);
  return status == cudaSuccess ? run_pass<S, true>(access, args, stream) : status;
}

}  // namespace

int moments(const MomentsArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
