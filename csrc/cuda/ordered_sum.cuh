// Sums in the order of core/ordered_sum.h: blocks of kSumBlock elements folded by one block of threads, the blocks of a
// sample by kSumLanes lanes, the samples likewise. Shared by the loss and the variational bound.
#pragma once

#include "../core/ordered_sum.h"
#include "memory.cuh"

namespace dk::cuda {

// Fold of the 32 values of one warp: lane + 16, ..., lane + 1. The sum is in lane 0.
template <class T>
__device__ __forceinline__ T fold_warp(T v) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) v = add(v, __shfl_down_sync(0xffffffffu, v, static_cast<unsigned>(half)));
  return v;
}

// values[0] of the fold of N values down to kLength: values[i] + values[i + half] for half = N / 2, ..., kLength.
template <int N, int kLength, class T>
__device__ __forceinline__ T fold(const T* values) {
  if constexpr (N == kLength) {
    return *values;
  } else {
    return add(fold<N, 2 * kLength>(values), fold<N, 2 * kLength>(values + kLength));
  }
}

// The squares of a chunk to shared memory. Threads with 8 values write two halves of 16 bytes, every other four of them
// the second half first, so that neighbours hit different banks.
template <class T, int W>
__device__ __forceinline__ void store_squares(T* squares, int local, const T (&v)[W]) {
  if constexpr (W == 8) {
    const bool second = threadIdx.x & 4;
    float4 low = make_float4(v[0], v[1], v[2], v[3]), high = make_float4(v[4], v[5], v[6], v[7]);
    float4* to = reinterpret_cast<float4*>(squares + local);
    to[second] = second ? high : low;
    to[!second] = second ? low : high;
  } else if constexpr (W == 4) {
    *reinterpret_cast<float4*>(squares + local) = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (W == 2) {
    *reinterpret_cast<double2*>(squares + local) = make_double2(v[0], v[1]);
  } else {
    static_assert(W == 1, "a chunk is 8, 4 or 2 values, or one element");
    squares[local] = v[0];
  }
}

// Chunks that a thread of a partial kernel holds, and how many threads make one block of the sum.
template <class S, Access access>
constexpr int kHeld = sizeof(S) == 8 && access != Access::scalar ? 2 : kChunks<S, access>;
template <class S, Access access>
constexpr int kSumThreads = kSumBlock / (kHeld<S, access> * kWidth<S, access>);

// Values 0, every, 2 every, ...: `count` of them, summed by kSumLanes lanes, then folded; valid in thread 0. One block
// of kSumLanes threads.
template <class T>
__device__ __forceinline__ T ordered_sum(const T* values, int64_t count, T* lanes, int64_t every = 1) {
  const int lane = static_cast<int>(threadIdx.x);
  T sum = T(0);
  for (int64_t i = lane; i < count; i += kSumLanes) sum = add(sum, values[i * every]);
  lanes[lane] = sum;
  __syncthreads();
  return lane < 32 ? fold_warp(fold<kSumLanes, 32>(lanes + lane)) : T(0);
}

// The sum or mean of the samples' losses; `samples` hold what is left to add.
template <class T, class Args>
__global__ void __launch_bounds__(kSumLanes) batch_kernel(const Args args) {
  __shared__ T lanes[kSumLanes];
  const T sum = ordered_sum(static_cast<const T*>(args.samples), args.space.batch, lanes);
  const bool mean_of_nothing = args.reduction == Reduction::mean && args.space.batch == 0;
  if (threadIdx.x == 0) *static_cast<T*>(args.value) = mean_of_nothing ? not_a_number<T>() : sum;
}

// The grid of one partial sum a block; false: more than a grid can have.
template <class S, Access access>
bool partial_shape(const Space& space, Shape& shape) {
  constexpr int per_thread = kHeld<S, access> * kWidth<S, access>;
  if (!make_shape(space.batch, space.count, per_thread, 1, shape)) return false;
  const int64_t blocks = sum_blocks(space.count);
  if (blocks > 0x7fffffff) return false;
  shape.threads = kSumThreads<S, access>;
  shape.grid.x = static_cast<unsigned>(blocks);
  return true;
}

// The partial sums; kernel_of(way) is the kernel of an access (for_access).
template <class S, bool kNoise, class Params, class KernelOf>
int launch_partials(const Space& space, Access access, void* stream, const Params& params, const KernelOf& kernel_of) {
  return for_access<S, kNoise>(access, [&](auto way) -> int {
    Shape shape;
    if (!partial_shape<S, decltype(way)::value>(space, shape)) return cudaErrorInvalidConfiguration;
    return launch(kernel_of(way), shape, stream, params);
  });
}

// What makes a value a sample of the partial sums: a block of lanes each.
template <class Params>
int launch_samples(void (*kernel)(Params), int64_t batch, void* stream, const Params& params) {
  Shape shape;
  if (!make_shape(batch, 1, 1, kSumLanes, shape)) return cudaErrorInvalidConfiguration;
  shape.threads = kSumLanes;
  return launch(kernel, shape, stream, params);
}

// After the partial sums: the samples, then a block of lanes for the batch.
template <class T, class Args>
int finish_sums(void (*samples_kernel)(Args), const Args& args, void* stream) {
  int status = cudaSuccess;
  if (args.space.batch > 0) status = launch_samples(samples_kernel, args.space.batch, stream, args);
  if (status == cudaSuccess && args.reduction != Reduction::none) {
    status = launch(batch_kernel<T, Args>, Shape{dim3(1), kSumLanes}, stream, args);
  }
  return status;
}

}  // namespace dk::cuda
