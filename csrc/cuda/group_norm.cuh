// What forward and backward of group normalisation share on the device: channels' parameters, sums by the lanes of a
// warp, and where a chunk's elements lie. csrc/core/group_norm.h has the order of the sums.
#pragma once

#include "../core/group_norm.h"
#include "memory.cuh"

namespace dk::cuda {

constexpr unsigned kNormThreads = 128;  // 4 warps
constexpr int kNormWarps = kNormThreads / kNormLanes;

// ------------------------------------------------------------------------------------------------ parameters
struct ReadChannel {
  __device__ __forceinline__ double operator()(const ChannelView& view, int64_t b, int64_t c) const {
    const int64_t at = b * view.batch_stride + c * view.stride;
    switch (view.dtype) {
#define DK_READ(NAME, TYPE, TORCH) \
  case Dtype::NAME:                \
    return decode(static_cast<const TYPE*>(view.data)[at]);
      DK_STORED_DTYPES(DK_READ)
#undef DK_READ
      case Dtype::u8:
        break;
    }
    return 0;
  }
};

__device__ __forceinline__ void write_channel(const ChannelView& view, int64_t b, int64_t c, double value) {
  const int64_t at = b * view.batch_stride + c * view.stride;
  switch (view.dtype) {
#define DK_WRITE(NAME, TYPE, TORCH)                   \
  case Dtype::NAME:                                   \
    encode(value, static_cast<TYPE*>(view.data)[at]); \
    break;
    DK_STORED_DTYPES(DK_WRITE)
#undef DK_WRITE
    case Dtype::u8:
      break;
  }
}

// ------------------------------------------------------------------------------------------------------ sums
// Fold of the values of a warp; the sum is in every lane.
template <class T>
__device__ __forceinline__ T fold_lanes(T v) {
#pragma unroll
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
    v = add(v, __shfl_down_sync(0xffffffffu, v, static_cast<unsigned>(half)));
  }
  return __shfl_sync(0xffffffffu, v, 0);
}

__device__ __forceinline__ int norm_lane() { return static_cast<int>(threadIdx.x) % kNormLanes; }

// This warp's number in the grid.
__device__ __forceinline__ int64_t norm_warp() {
  return static_cast<int64_t>(blockIdx.x) * kNormWarps + static_cast<int>(threadIdx.x) / kNormLanes;
}

// The sum of term(c) over the channels of a group, by a warp.
template <class Term>
__device__ __forceinline__ double norm_sum(int64_t begin, int64_t end, const Term& term) {
  double sum = 0;
  for (int64_t c = begin + norm_lane(); c < end; c += kNormLanes) sum = add(sum, term(c));
  return fold_lanes(sum);
}

// One partial of a channels_last sample is a thread's, one of a contiguous sample a warp's.
template <bool last>
struct PartialPlace {
  int64_t b, block, c, n;  // n positions
  int64_t offset, step;    // in elements of the sample: of this thread's first, from each to its next
  int64_t first, every;    // the same in positions of the block
  bool valid;

  __device__ __forceinline__ explicit PartialPlace(const NormProblem& p) {
    const int64_t index = last ? static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x : norm_warp();
    const int64_t blocks = norm_blocks(p);
    valid = index < p.batch * blocks * p.channels;
    if (!valid) return;
    *this = PartialPlace(p, index / p.channels / blocks, index / p.channels % blocks, index % p.channels);
  }

  __device__ __forceinline__ PartialPlace(const NormProblem& p, int64_t sample, int64_t of_block, int64_t channel)
      : b(sample), block(of_block), c(channel), n(norm_size(p, of_block)), valid(true) {
    first = last ? 0 : norm_lane();
    every = last ? 1 : kNormLanes;
    const int64_t position = block * norm_block(p) + first;
    offset = last ? position * p.channels + c : c * p.positions + position;
    step = last ? p.channels : kNormLanes;
  }
};

template <bool last, class T>
__device__ __forceinline__ T norm_gather(T v) {
  return last ? v : fold_lanes(v);
}

// -------------------------------------------------------------------------------------------------- elements
// W neighbours of a sample: of one channel where it is contiguous, of one position where it is channels_last.
template <int W>
struct ElementPlace {
  int64_t b, first, c;
  bool valid;

  __device__ __forceinline__ explicit ElementPlace(const NormProblem& p) {
    const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t chunks = p.channels * p.positions / W;
    valid = chunk < p.batch * chunks;
    if (!valid) return;
    b = chunk / chunks;
    first = chunk % chunks * W;
    c = p.channels_last ? first % p.channels : first / p.positions;
  }
};

// Factor number `k` of element j of a chunk.
template <class T>
__device__ __forceinline__ T norm_factor(const GroupNormArgs& args, const T* factors, int k, int64_t c, int j) {
  return factors[k * args.problem.channels + c + (args.problem.channels_last ? j : 0)];
}

inline bool norm_vectors(const NormProblem& p, int width, std::initializer_list<const View*> views) {
  const int64_t inner = p.channels_last ? p.channels : p.positions;
  bool aligned = inner % width == 0;
  for (const View* view : views) aligned = aligned && is_aligned(*view, p.batch, width);
  return aligned;
}

template <class Params>
int launch_norm(void (*kernel)(Params), int64_t count, int per_block, void* stream, const Params& params) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(kernel, Shape{dim3(static_cast<unsigned>(blocks)), kNormThreads}, stream, params);
}

// A kernel over all partials: kernel_of(last) with `last` as a type.
template <class KernelOf>
int launch_norm_partials(const GroupNormArgs& args, void* stream, const KernelOf& kernel_of) {
  const NormProblem& p = args.problem;
  const int64_t count = p.batch * norm_blocks(p) * p.channels;
  if (p.channels_last) return launch_norm(kernel_of(std::true_type{}), count, kNormThreads, stream, args);
  return launch_norm(kernel_of(std::false_type{}), count, kNormWarps, stream, args);
}

// A kernel over all elements, W of them a thread: kernel_of(width) with W as a type.
template <class S, class KernelOf>
int launch_norm_elements(const GroupNormArgs& args, std::initializer_list<const View*> views, void* stream,
                         const KernelOf& kernel_of) {
  constexpr int W = 16 / static_cast<int>(sizeof(S));
  const NormProblem& p = args.problem;
  const int64_t count = p.batch * p.channels * p.positions;
  if (norm_vectors(p, W, views)) {
    return launch_norm(kernel_of(std::integral_constant<int, W>{}), count / W, kNormThreads, stream, args);
  }
  return launch_norm(kernel_of(std::integral_constant<int, 1>{}), count, kNormThreads, stream, args);
}

}  // namespace dk::cuda
