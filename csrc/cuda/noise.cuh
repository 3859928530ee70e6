// Noise by address inside a kernel: each quad of a tile is drawn once, into registers where a chunk is whole quads,
// else into shared memory in the order of the positions.
#pragma once

#include "../core/normal.h"
#include "../core/philox.h"
#include "memory.cuh"

namespace dk::cuda {

__device__ __forceinline__ void draw_quad(uint64_t seed, uint64_t stream, uint64_t q, float (&z)[4]) {
  const Words w = philox(seed, stream, q);
  const Pair first = normal_pair(w.r[0], w.r[1]), second = normal_pair(w.r[2], w.r[3]);
  z[0] = first.a;
  z[1] = first.b;
  z[2] = second.a;
  z[3] = second.b;
}

__device__ __forceinline__ uint64_t seed_of(const Seeds& seeds, int64_t sample) {
  return static_cast<uint64_t>(seeds.data[sample * seeds.stride]);
}

// One quad of a sample's noise, q = element / 4.
struct Normals {
  uint64_t seed, stream;
  __device__ __forceinline__ void operator()(uint64_t q, float (&z)[4]) const { draw_quad(seed, stream, q, z); }
};

__device__ __forceinline__ void store_quad(float* z, const float (&quad)[4]) {
  *reinterpret_cast<float4*>(z) = make_float4(quad[0], quad[1], quad[2], quad[3]);
}
__device__ __forceinline__ void store_quad(double* z, const double (&quad)[4]) {
  // Eight threads store together, 16 bytes each and 32 apart: four of them begin with the second half, so that the
  // eight meet all banks.
  const bool swap = threadIdx.x & 4;
  double2* to = reinterpret_cast<double2*>(z);
  to[swap] = swap ? make_double2(quad[2], quad[3]) : make_double2(quad[0], quad[1]);
  to[!swap] = swap ? make_double2(quad[0], quad[1]) : make_double2(quad[2], quad[3]);
}

// Noise of positions begin .. begin + n - 1 (begin is a multiple of 4), to z[0 .. n), and something to the rest of the
// last chunk, which is read whole. `draw(q, quad)` gives quad q of the sample. All threads of the block call this; it
// ends with a barrier.
template <class T, class Draw>
__device__ __forceinline__ void stage_quads(const Space& space, const Draw& draw, int64_t begin, int n, T* z) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool ordered = space.layout != Layout::channels_last || space.channels == 1 || space.channels == space.count;
  const int drawn = ordered ? (n + 3) / 4 * 4 : n;
  if (thread < (-drawn & 7)) z[drawn + thread] = T(0);
  if (ordered) {
    for (int k = thread; 4 * k < n; k += threads) {  // z has room for whole quads
      T quad[4];
      draw(static_cast<uint64_t>(begin / 4 + k), quad);
      store_quad(z + 4 * k, quad);
    }
  } else {
    // Position p = inner C + c. The tile holds inner indices low(c) .. high(c) - 1 of channel c: one run of elements.
    const int64_t channels = space.channels, inner = space.count / channels;
    const int64_t row = begin / channels, column = begin - row * channels;
    const int64_t last_row = (begin + n) / channels, last_column = begin + n - last_row * channels;
    const int64_t quads = ((n + channels - 1) / channels + 6) / 4;  // that a run of so many elements may touch
    if (channels * quads <= n) {
      const int candidates = static_cast<int>(channels * quads), columns = static_cast<int>(channels);
      for (int k = thread; k < candidates; k += threads) {
        const int c = k % columns;
        const int64_t low = c * inner + row + (c >= column ? 0 : 1);  // as elements
        const int64_t high = c * inner + last_row + (c < last_column ? 1 : 0);
        const int64_t q = low / 4 + k / columns;
        if (4 * q >= high) continue;
        T quad[4];
        draw(static_cast<uint64_t>(q), quad);
#pragma unroll
        for (int lane = 0; lane < 4; ++lane) {
          const int64_t i = 4 * q + lane;
          if (i >= low && i < high) z[(i - c * inner) * channels + c - begin] = quad[lane];
        }
      }
    } else {  // many channels: hardly two elements of a quad lie in the same tile
      for (int k = thread; k < n; k += threads) {
        const int64_t p = begin + k, i_inner = p / channels, i = (p - i_inner * channels) * inner + i_inner;
        T quad[4];
        draw(static_cast<uint64_t>(i) / 4, quad);
        const int lane = static_cast<int>(i & 3);
        z[k] = lane == 0 ? quad[0] : lane == 1 ? quad[1] : lane == 2 ? quad[2] : quad[3];
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void stage_noise(const Space& space, uint64_t seed, uint64_t stream, int64_t begin, int n,
                                            float* z) {
  stage_quads(space, Normals{seed, stream}, begin, n, z);
}

// Where a block's threads find the noise of their chunks.
template <class S, Access access, int kTileThreads = static_cast<int>(kThreads)>
struct NoiseTile {
  static constexpr int kRoom = access == Access::direct ? 4 : kTileThreads * kWidth<S, access> * kChunks<S, access>;
};

// A chunk of staged values.
template <class Staged, class T, int W>
__device__ __forceinline__ void read_staged(const Staged* from, T (&z)[W]) {
  if constexpr (sizeof(Staged) * W % 16 == 0) {
    constexpr int kPart = 16 / static_cast<int>(sizeof(Staged));
#pragma unroll
    for (int k = 0; k < W; k += kPart) {
      if constexpr (sizeof(Staged) == 8) {
        const double2 v = *reinterpret_cast<const double2*>(from + k);
        z[k] = v.x;
        z[k + 1] = v.y;
      } else {
        const float4 v = *reinterpret_cast<const float4*>(from + k);
        z[k] = v.x;
        z[k + 1] = v.y;
        z[k + 2] = v.z;
        z[k + 3] = v.w;
      }
    }
  } else if constexpr (W == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    z[0] = v.x;
    z[1] = v.y;
  } else {
    static_assert(W == 1, "a chunk is 16 bytes, or one element");
    z[0] = from[0];
  }
}

// Noise of a chunk, `local` = its first position within the tile.
template <Access access, class T, int W>
__device__ __forceinline__ void chunk_noise(const float* staged, uint64_t seed, uint64_t stream, int64_t first,
                                            int local, T (&z)[W]) {
  if constexpr (access == Access::direct) {
    static_assert(W % 4 == 0, "a chunk is whole quads");
#pragma unroll
    for (int k = 0; k < W; k += 4) {
      float quad[4];
      draw_quad(seed, stream, static_cast<uint64_t>((first + k) / 4), quad);
#pragma unroll
      for (int j = 0; j < 4; ++j) z[k + j] = quad[j];
    }
  } else {
    read_staged(staged + local, z);
  }
}

}  // namespace dk::cuda
