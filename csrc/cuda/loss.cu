// Weighted squared error and its gradient. One block of threads makes one partial sum (a block of kSumBlock
// elements, as core/ordered_sum.h orders them), then a block a sample adds the partials, then one block adds the
// samples.
#include "../core/loss.h"
#include "noise.cuh"
#include "ordered_sum.cuh"

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

template <class S, Access access>
__global__ void __launch_bounds__(kSumThreads<S, access>, kMinBlocks) partial_kernel(const LossArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) float staged[access == Access::direct ? 4 : kSumBlock];
  __shared__ __align__(16) T squares[kSumBlock];
  __shared__ LossRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSumBlock, left = args.space.count - begin;
  if (threadIdx.x == 0) shared_row = find_row<T>(args, b);
  __syncthreads();
  const LossRow<T> row = shared_row;
  if (access != Access::direct && row.draws) {
    stage_noise(args.space, row.seed, args.stream, begin, left < kSumBlock ? static_cast<int>(left) : kSumBlock,
                staged);
  }
#pragma unroll 1
  for (int k = 0; k < kHeld<S, access>; ++k) {
    const int local = (k * kSumThreads<S, access> + static_cast<int>(threadIdx.x)) * W;
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
    const T sum = fold_warp(fold<kSumBlock, 32>(squares + threadIdx.x));
    if (threadIdx.x == 0) static_cast<T*>(args.partials)[b * gridDim.x + blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kSumLanes) samples_kernel(const LossArgs args) {
  __shared__ T lanes[kSumLanes];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t blocks = sum_blocks(args.space.count);
  const T sum = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks, lanes);
  if (threadIdx.x == 0) {
    const LossRow<T> row = find_row<T>(args, b);
    T* samples = static_cast<T*>(args.reduction == Reduction::none ? args.value : args.samples);
    samples[b] = row.invalid ? not_a_number<T>() : mul(row.k.value, sum);
  }
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
    status = launch_partials<S, true>(space, access, stream, args,
                                      [](auto way) { return partial_kernel<S, decltype(way)::value>; });
  }
  return status == cudaSuccess ? finish_sums<T>(samples_kernel<T>, args, stream) : status;
}

}  // namespace

int loss(const LossArgs& args, void* stream) {
  return for_dtype(args.x0.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
