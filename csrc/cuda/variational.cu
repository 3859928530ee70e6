// The variational bound of a reverse step and its gradient, summed in the order of core/ordered_sum.h: one block
// of threads makes the two partial sums (squares and nats) of a block of kSumBlock elements.
#include "../core/variational.h"
#include "noise.cuh"
#include "ordered_sum.cuh"

namespace dk::cuda {
namespace {

template <class T>
struct VariationalRow {
  VariationalCoefficients<T> k;
  uint64_t seed;
  bool draws, reads, invalid;
};

template <class T>
__device__ VariationalRow<T> find_row(const VariationalArgs& args, int64_t b) {
  VariationalRow<T> row{};
  const int64_t number = row_number(args.rows, b);
  row.invalid = number < 0;
  if (row.invalid) return row;
  const int64_t averaged = args.reduction == Reduction::mean ? args.space.batch : 1;
  row.k = variational_coefficients<T>(args.rows.table + number * kBoundColumns, args.space.count, averaged);
  const bool wants = row.k.v != T(0);
  row.reads = wants && args.noise.data != nullptr;
  row.draws = wants && !row.reads && args.seeds.data != nullptr;
  row.invalid = (wants && !row.reads && !row.draws) || (row.k.r1 != T(0) && args.w.data == nullptr);
  if (row.draws) row.seed = seed_of(args.seeds, b);
  return row;
}

template <bool decodes, class T, int W>
__device__ __forceinline__ void elements(const VariationalCoefficients<T>& k, int n, const T (&x0)[W], const T (&z)[W],
                                         T (&pred)[W], T (&w)[W], T (&square)[W], T (&nats)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const auto element = variational_element<decodes>(k, pred[j], w[j], x0[j], z[j]);
    square[j] = j < n ? element.square : T(0);
    nats[j] = j < n ? element.nats : T(0);
    pred[j] = element.by_pred;
    w[j] = element.by_w;
  }
}

template <class S, Access access>
__global__ void __launch_bounds__(kSumThreads<S, access>, kMinBlocks) bound_kernel(const VariationalArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) float staged[access == Access::direct ? 4 : kSumBlock];
  __shared__ __align__(16) T squares[kSumBlock];
  __shared__ __align__(16) T all_nats[kSumBlock];
  __shared__ VariationalRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSumBlock, left = args.space.count - begin;
  if (threadIdx.x == 0) shared_row = find_row<T>(args, b);
  __syncthreads();
  const VariationalRow<T>& row = shared_row;
  if (access != Access::direct && row.draws) {
    stage_noise(args.space, row.seed, args.stream, begin, left < kSumBlock ? static_cast<int>(left) : kSumBlock,
                staged);
  }
#pragma unroll 1
  for (int c = 0; c < kHeld<S, access>; ++c) {
    const int local = (c * kSumThreads<S, access> + static_cast<int>(threadIdx.x)) * W;
    const Place<access> place(args.space, b, begin + local, W);
    T pred[W] = {}, w[W] = {}, x0[W] = {}, z[W] = {}, square[W], nats[W];
    if (place.n > 0) {
      load_any(args.pred, place.offset(args.pred), place.n, pred);
      if (args.w.data != nullptr) load_any(args.w, place.offset(args.w), place.n, w);
      load_state<S>(args.x0, place, x0);
      if (row.reads) load_state<S>(args.noise, place, z);
      if (row.draws) chunk_noise<access>(staged, row.seed, args.stream, place.first, local, z);
    }
    if (row.invalid) {
#pragma unroll
      for (int j = 0; j < W; ++j) pred[j] = w[j] = square[j] = nats[j] = not_a_number<T>();
    } else if (row.k.decodes) {
      elements<true>(row.k, place.n, x0, z, pred, w, square, nats);
    } else {
      elements<false>(row.k, place.n, x0, z, pred, w, square, nats);
    }
    store_squares(squares, local, square);
    store_squares(all_nats, local, nats);
    if (place.n > 0) {
      if (args.grad.data != nullptr) store_any(args.grad, place.offset(args.grad), place.n, pred);
      if (args.grad_w.data != nullptr) store_any(args.grad_w, place.offset(args.grad_w), place.n, w);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const T sum = fold_warp(fold<kSumBlock, 32>(squares + threadIdx.x));
    const T sum_nats = fold_warp(fold<kSumBlock, 32>(all_nats + threadIdx.x));
    if (threadIdx.x == 0) {
      T* partial = static_cast<T*>(args.partials) + 2 * (b * gridDim.x + blockIdx.x);
      partial[0] = sum;
      partial[1] = sum_nats;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kSumLanes) samples_kernel(const VariationalArgs args) {
  __shared__ T lanes[2][kSumLanes];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t blocks = sum_blocks(args.space.count);
  const T* partials = static_cast<const T*>(args.partials) + 2 * b * blocks;
  const T squares = ordered_sum(partials, blocks, lanes[0], 2), nats = ordered_sum(partials + 1, blocks, lanes[1], 2);
  if (threadIdx.x == 0) {
    const VariationalRow<T> row = find_row<T>(args, b);
    T* samples = static_cast<T*>(args.reduction == Reduction::none ? args.value : args.samples);
    T* means = static_cast<T*>(args.means) + 2 * b;
    means[0] = row.invalid ? not_a_number<T>() : mul(row.k.squares, squares);
    means[1] = row.invalid ? not_a_number<T>() : mul(row.k.bits, nats);
    samples[b] = row.invalid ? not_a_number<T>() : weighted_bound(row.k, squares, nats);
  }
}

template <class S>
int run(const VariationalArgs& args, void* stream) {
  using T = Arithmetic<S>;
  if (args.noise.data != nullptr && args.noise.dtype != args.x0.dtype) return cudaErrorInvalidValue;
  const Space& space = args.space;
  int status = cudaSuccess;
  if (space.batch > 0 && space.count > 0) {
    const Access access = choose_access<S>(space, args.seeds.data != nullptr, args.pred, args.w, args.x0, args.noise,
                                           args.grad, args.grad_w);
    status = launch_partials<S, true>(space, access, stream, args,
                                      [](auto way) { return bound_kernel<S, decltype(way)::value>; });
  }
  return status == cudaSuccess ? finish_sums<T>(samples_kernel<T>, args, stream) : status;
}

}  // namespace

int variational(const VariationalArgs& args, void* stream) {
  return for_dtype(args.x0.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
