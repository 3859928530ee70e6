// Weighted squared error and its gradient. One block of threads makes one partial sum (a block of kLossBlock
// elements, as core/loss.h orders them), then a block a sample adds the partials, then one block adds the samples.
#include "../core/loss.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

template <class T>
struct LossRow {
  LossCoefficients<T> k;
  uint64_t seed;
  bool draws, reads, invalid;
};

template <class T>
__device__ LossRow<T> find_row(const LossArgs& args, int64_t b) {
  LossRow<T> row{};
  const int64_t number = row_number(args.rows, b);
  row.invalid = number < 0;
  if (row.invalid) return row;
  const int64_t averaged = args.reduction == Reduction::mean ? args.space.batch : 1;
  row.k = loss_coefficients<T>(args.rows.table + number * kLossColumns, args.space.count, averaged);
  const bool wants = row.k.v != T(0);
  row.reads = wants && args.noise.data != nullptr;
  row.draws = wants && !row.reads && args.seeds.data != nullptr;
  row.invalid = wants && !row.reads && !row.draws;
  if (row.draws) row.seed = seed_of(args.seeds, b);
  return row;
}

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
    squares[local] = v[0];
  }
}

// Chunks that a thread of the partial kernel holds: kThreadsOf threads make one loss block.
template <class S, Access access>
constexpr int kHeld = sizeof(S) == 8 && access != Access::scalar ? 2 : kChunks<S, access>;
template <class S, Access access>
constexpr int kLossThreads = kLossBlock / (kHeld<S, access> * kWidth<S, access>);

template <class S, Access access>
__global__ void __launch_bounds__(kLossThreads<S, access>, kMinBlocks) partial_kernel(const LossArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) float staged[access == Access::direct ? 4 : kLossBlock];
  __shared__ __align__(16) T squares[kLossBlock];
  __shared__ LossRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kLossBlock, left = args.space.count - begin;
  if (threadIdx.x == 0) shared_row = find_row<T>(args, b);
  __syncthreads();
  const LossRow<T> row = shared_row;
  if (access != Access::direct && row.draws) {
    stage_noise(args.space, row.seed, args.stream, begin, left < kLossBlock ? static_cast<int>(left) : kLossBlock,
                staged);
  }
#pragma unroll 1
  for (int k = 0; k < kHeld<S, access>; ++k) {
    const int local = (k * kLossThreads<S, access> + static_cast<int>(threadIdx.x)) * W;
    const Place<access> place(args.space, b, begin + local, W);
    T pred[W] = {}, x0[W] = {}, z[W] = {}, grad[W], square[W];
    if (place.n > 0) {
      load_any(args.pred, place.offset(args.pred), place.n, pred);
      if (row.k.u != T(0)) load_state<S>(args.x0, place, x0);
      if (row.reads) load_state<S>(args.noise, place, z);
      if (row.draws) chunk_noise<access>(staged, row.seed, args.stream, place.first, local, z);
    }
#pragma unroll
    for (int j = 0; j < W; ++j) {
      T difference = sub(pred[j], affine(row.k.u, x0[j], row.k.v, z[j]));
      if (row.invalid) difference = not_a_number<T>();
      grad[j] = row.invalid ? difference : mul(row.k.gradient, difference);
      square[j] = j < place.n ? mul(difference, difference) : T(0);
    }
    store_squares(squares, local, square);
    if (args.grad.data != nullptr && place.n > 0) {
      store_any(args.grad, place.offset(args.grad), place.n, grad);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const T sum = fold_warp(fold<kLossBlock, 32>(squares + threadIdx.x));
    if (threadIdx.x == 0) static_cast<T*>(args.partials)[b * gridDim.x + blockIdx.x] = sum;
  }
}

// `count` values summed by kLossLanes lanes, then folded; valid in thread 0. One block of kLossLanes threads.
template <class T>
__device__ __forceinline__ T ordered_sum(const T* values, int64_t count, T* lanes) {
  const int lane = static_cast<int>(threadIdx.x);
  T sum = T(0);
  for (int64_t i = lane; i < count; i += kLossLanes) sum = add(sum, values[i]);
  lanes[lane] = sum;
  __syncthreads();
  return lane < 32 ? fold_warp(fold<kLossLanes, 32>(lanes + lane)) : T(0);
}

template <class T>
__global__ void __launch_bounds__(kLossLanes) samples_kernel(const LossArgs args) {
  __shared__ T lanes[kLossLanes];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t blocks = (args.space.count + kLossBlock - 1) / kLossBlock;
  const T sum = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks, lanes);
  if (threadIdx.x == 0) {
    const LossRow<T> row = find_row<T>(args, b);
    T* samples = static_cast<T*>(args.reduction == Reduction::none ? args.value : args.samples);
    samples[b] = row.invalid ? not_a_number<T>() : mul(row.k.value, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kLossLanes) batch_kernel(const LossArgs args) {
  __shared__ T lanes[kLossLanes];
  const T sum = ordered_sum(static_cast<const T*>(args.samples), args.space.batch, lanes);
  const bool mean_of_nothing = args.reduction == Reduction::mean && args.space.batch == 0;
  if (threadIdx.x == 0) *static_cast<T*>(args.value) = mean_of_nothing ? not_a_number<T>() : sum;
}

template <class S, Access access>
int run_partials(const LossArgs& args, void* stream) {
  Shape shape;
  constexpr int per_thread = kHeld<S, access> * kWidth<S, access>;
  if (!make_shape(args.space.batch, args.space.count, per_thread, 1, shape)) return cudaErrorInvalidConfiguration;
  const int64_t blocks = (args.space.count + kLossBlock - 1) / kLossBlock;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  shape.threads = kLossThreads<S, access>;
  shape.grid.x = static_cast<unsigned>(blocks);
  return launch(partial_kernel<S, access>, shape, stream, args);
}

template <class S>
int run(const LossArgs& args, void* stream) {
  using T = Arithmetic<S>;
  if (args.noise.data != nullptr && args.noise.dtype != args.x0.dtype) return cudaErrorInvalidValue;
  const Space& space = args.space;
  int status = cudaSuccess;
  if (space.batch > 0 && space.count > 0) {
    const Access access =
        choose_access<S>(space, args.seeds.data != nullptr, args.pred, args.x0, args.noise, args.grad);
    if (access == Access::scalar) {
      status = run_partials<S, Access::scalar>(args, stream);
    } else if (access == Access::staged || sizeof(S) == 8) {
      status = run_partials<S, Access::staged>(args, stream);
    } else if constexpr (sizeof(S) != 8) {
      status = run_partials<S, Access::direct>(args, stream);
    }
  }
  if (status == cudaSuccess && space.batch > 0) {
    Shape shape;
    if (!make_shape(space.batch, 1, 1, kLossLanes, shape)) return cudaErrorInvalidConfiguration;
    shape.threads = kLossLanes;
    status = launch(samples_kernel<T>, shape, stream, args);
  }
  if (status == cudaSuccess && args.reduction != Reduction::none) {
    status = launch(batch_kernel<T>, Shape{dim3(1), kLossLanes}, stream, args);
  }
  return status;
}

}  // namespace

int loss(const LossArgs& args, void* stream) {
  switch (args.x0.dtype) {
    case Dtype::f64:
      return run<double>(args, stream);
    case Dtype::f32:
      return run<float>(args, stream);
    case Dtype::f16:
      return run<Half>(args, stream);
    case Dtype::bf16:
      return run<Bfloat16>(args, stream);
    case Dtype::u8:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dk::cuda
