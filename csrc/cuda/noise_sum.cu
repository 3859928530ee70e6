// Weighted sums of noise by address: all terms of a quad in registers, one store.
#include "../core/noise_sum.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

template <class T>
struct Params {
  Space space;
  View out;
  Seeds seeds;
  NoiseTerms<T> terms;
};

// One quad of the sum, q = element / 4.
template <class T>
struct Sum {
  const NoiseTerms<T>& terms;
  uint64_t seed;
  __device__ __forceinline__ void operator()(uint64_t q, T (&sum)[4]) const {
#pragma unroll
    for (int lane = 0; lane < 4; ++lane) sum[lane] = T(0);
#pragma unroll 1
    for (int j = 0; j < terms.n; ++j) {
      const T weight = terms.weight[j];
      float z[4];
      draw_quad(seed, terms.stream[j], q, z);
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) sum[lane] = fma(weight, static_cast<T>(z[lane]), sum[lane]);
    }
  }
};

template <class S, Access access>
__global__ void __launch_bounds__(kThreads, kMinBlocks) noise_sum_kernel(const Params<Arithmetic<S>> args) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  __shared__ __align__(16) T staged[NoiseTile<S, access>::kRoom];
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int tile = static_cast<int>(blockDim.x) * W * kChunks<S, access>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, left = args.space.count - begin;
  const Sum<T> draw{args.terms, seed_of(args.seeds, b)};
  if (access != Access::direct) {
    stage_quads(args.space, draw, begin, left < tile ? static_cast<int>(left) : tile, staged);
  }
#pragma unroll 1
  for (int k = 0; k < kChunks<S, access>; ++k) {
    const int local = static_cast<int>(k * blockDim.x + threadIdx.x) * W;
    const Place<access> place(args.space, b, begin + local, W);
    if (place.n == 0) return;
    T sum[W];
    if constexpr (access == Access::direct) {
#pragma unroll
      for (int j = 0; j < W; j += 4) {
        T quad[4];
        draw(static_cast<uint64_t>((place.first + j) / 4), quad);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) sum[j + lane] = quad[lane];
      }
    } else {
      read_staged(staged + local, sum);
    }
    store_state<S>(args.out, place, sum);
  }
}

template <class S>
int run(const NoiseSumArgs& args, void* stream) {
  Params<Arithmetic<S>> params{args.space, args.out, args.seeds, {}};
  params.terms.n = args.terms.n;
  for (int j = 0; j < args.terms.n; ++j) {
    params.terms.stream[j] = args.terms.stream[j];
    params.terms.weight[j] = static_cast<Arithmetic<S>>(args.terms.weight[j]);
  }
  const Access access = choose_access<S>(args.space, true, args.out);
  return launch_elements<S>(args.space, access, stream, params,
                            [](auto way) { return noise_sum_kernel<S, decltype(way)::value>; });
}

}  // namespace

int noise_sum(const NoiseSumArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  return for_dtype(args.out.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
