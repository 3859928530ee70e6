// Standard normals by address.
#include "../core/randn.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

template <class S, Access access>
__global__ void __launch_bounds__(kThreads, kMinBlocks) randn_kernel(const RandnArgs args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) float staged[NoiseTile<S, access>::kRoom];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int tile = static_cast<int>(blockDim.x) * W * kChunks<S, access>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, left = args.space.count - begin;
  const uint64_t seed = seed_of(args.seeds, b);
  if (access != Access::direct) {
    stage_noise(args.space, seed, args.stream, begin, left < tile ? static_cast<int>(left) : tile, staged);
  }
#pragma unroll 1
  for (int k = 0; k < kChunks<S, access>; ++k) {
    const int local = static_cast<int>(k * blockDim.x + threadIdx.x) * W;
    const Place<access> place(args.space, b, begin + local, W);
    if (place.n == 0) return;
    T z[W];
    chunk_noise<access>(staged, seed, args.stream, place.first, local, z);
    store_state<S>(args.out, place, z);
  }
}

template <class S>
int run(const RandnArgs& args, void* stream) {
  const Access access = choose_access<S>(args.space, true, args.out);
  return launch_elements<S>(args.space, access, stream, args,
                            [](auto way) { return randn_kernel<S, decltype(way)::value>; });
}

}  // namespace

int randn(const RandnArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  return for_dtype(args.out.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
