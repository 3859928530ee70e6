// Forward noising: x_t, and the target and eps where they are asked for, in one pass.
#include "../core/noising.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

// What a block needs to know of its sample; read by one thread.
template <class T>
struct NoisingRow {
  NoisingCoefficients<T> k;
  uint64_t seed;
  bool draws;    // by address
  bool reads;    // noise from a tensor
  bool invalid;  // no such row, or noise that nobody gave: outputs are NaN
};

template <class T>
__device__ NoisingRow<T> find_row(const NoisingArgs& args, int64_t b) {
  NoisingRow<T> row{};
  const int64_t number = row_number(args.rows, b);
  row.invalid = number < 0;
  if (row.invalid) return row;
  row.k = noising_coefficients<T>(args.rows.table + number * kNoisingColumns);
  const bool wants = row.k.n != T(0) || (row.k.v != T(0) && args.target.data != nullptr) || args.eps.data != nullptr;
  row.reads = wants && args.noise.data != nullptr;
  row.draws = wants && !row.reads && args.seeds.data != nullptr;
  row.invalid = wants && !row.reads && !row.draws;
  if (row.draws) row.seed = seed_of(args.seeds, b);
  return row;
}

template <class S, Access access>
__global__ void __launch_bounds__(kThreads, kMinBlocks) noising_kernel(const NoisingArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  constexpr bool kOnce = kChunks<S, access> == 1;
  __shared__ __align__(16) float staged[NoiseTile<S, access>::kRoom];
  __shared__ NoisingRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int tile = static_cast<int>(blockDim.x) * W * kChunks<S, access>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, left = args.space.count - begin;

  T x0[W];
  if (kOnce) {  // on its way while the row is looked up
    const Place<access> place(args.space, b, begin + static_cast<int>(threadIdx.x) * W, W);
    if (place.n > 0) load_state<S>(args.x0, place, x0);
  }
  if (threadIdx.x == 0) shared_row = find_row<T>(args, b);
  __syncthreads();
  const NoisingRow<T> row = shared_row;
  if (access != Access::direct && row.draws) {
    stage_noise(args.space, row.seed, args.stream, begin, left < tile ? static_cast<int>(left) : tile, staged);
  }
#pragma unroll 1
  for (int k = 0; k < kChunks<S, access>; ++k) {
    const int local = static_cast<int>(k * blockDim.x + threadIdx.x) * W;
    const Place<access> place(args.space, b, begin + local, W);
    if (place.n == 0) return;
    if (!kOnce) load_state<S>(args.x0, place, x0);
    T z[W], x_t[W], target[W];
#pragma unroll
    for (int j = 0; j < W; ++j) z[j] = T(0);
    if (row.reads) load_state<S>(args.noise, place, z);
    if (row.draws) chunk_noise<access>(staged, row.seed, args.stream, place.first, local, z);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      x_t[j] = affine(row.k.s, x0[j], row.k.n, z[j]);
      target[j] = affine(row.k.u, x0[j], row.k.v, z[j]);
      if (row.invalid) x_t[j] = target[j] = z[j] = not_a_number<T>();
    }
    store_state<S>(args.out, place, x_t);
    if (args.target.data != nullptr) store_state<S>(args.target, place, target);
    if (args.eps.data != nullptr) store_state<S>(args.eps, place, z);
  }
}

template <class S>
int run(const NoisingArgs& args, void* stream) {
  if (!all_are(args.x0.dtype, {&args.noise, &args.out, &args.target, &args.eps})) return cudaErrorInvalidValue;
  const Access access =
      choose_access<S>(args.space, args.seeds.data != nullptr, args.x0, args.noise, args.out, args.target, args.eps);
  return launch_elements<S>(args.space, access, stream, args,
                            [](auto way) { return noising_kernel<S, decltype(way)::value>; });
}

}  // namespace

int noising(const NoisingArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  return for_dtype(args.x0.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
