// Exact float32 attention: what the forward and the backward kernels do with tiles.
//
// A block owns kM rows (of queries, or of keys) and walks over tiles of kN columns. Everything is one of two products:
//   multiply    s[row][column] += sum over 16 channels of a[row][channel] b[column][channel]
//   accumulate  acc[row][channel] += sum over kChunk columns of p[row][column] x[column][channel]
// a, b and x come from global memory into one of two stages of shared memory while the other stage is used; p is
// written to shared memory by the warp that reads it.
//
// All fragments are read 16 bytes at a time, 4 steps along the sum for one row or 4 rows for one step: the number of
// reads is the same, so tiles stay in the order they have in global memory and nothing is transposed. Where the threads
// of a warp read different rows, a row is an odd number of 16-byte units long and the rows of neighbouring threads are
// neighbours (`position_of`): no bank conflicts.
#pragma once

#include "attention_ffma_copy.cuh"

namespace dk::cuda::ffma {

constexpr int kChain = 64;  // channels that are summed one after the other

// ------------------------------------------------------------------------------------------------------- products
struct Place {  // of a thread
  int x, y;
};
template <class T>
__device__ __forceinline__ Place place() {
  return {static_cast<int>(threadIdx.x) % T::kX, static_cast<int>(threadIdx.x) / T::kX};
}

__device__ __forceinline__ float4 load_4(const float* from) { return *reinterpret_cast<const float4*>(from); }
// The same as an instruction, for rows that differ between threads: nvcc now and then reads the second half once more,
// with bank conflicts.
__device__ __forceinline__ float4 load_4_whole(const float* from) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from)))
               : "memory");
  return v;
}
__device__ __forceinline__ void store_4(float* to, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(to) = make_float4(a, b, c, d);
}
__device__ __forceinline__ float get(const float4& v, int k) {  // k is a constant after unrolling
  return k == 0 ? v.x : k == 1 ? v.y : k == 2 ? v.z : v.w;
}

// n channels (8 or 16) of a stage that copy_pair filled for both operands.
template <class T, Order order>
__device__ __forceinline__ void multiply(const Place& me, const float* stage, int n,
                                         float (&s)[kRows][4 * T::kColumnGroups]) {
  constexpr int kColumns = 4 * T::kColumnGroups;
  constexpr int kStep = 8;
  const float *a = stage, *b = stage + T::kM * (order == Order::tokens ? T::kDepthStride : kDepth);
#pragma unroll 1
  for (int start = 0; start < n; start += kStep) {
#pragma unroll
    for (int d = start; d < start + kStep; d += 4) {
      if constexpr (order == Order::tokens) {
        float4 bs[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          bs[j] = load_4_whole(b + (j / 4 * T::kGroup + j % 4 * T::kX + me.x) * T::kDepthStride + d);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float4 as = load_4(a + (kRows * me.y + r) * T::kDepthStride + d);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) s[r][j] = fma(get(as, k), get(bs[j], k), s[r][j]);
          }
        }
      } else {
#pragma unroll
        for (int k = d; k < d + 4; ++k) {
          const float4 as[2] = {load_4(a + k * T::kM + kRows * me.y), load_4(a + k * T::kM + kRows * me.y + 4)};
          float4 bs[T::kColumnGroups];
#pragma unroll
          for (int g = 0; g < T::kColumnGroups; ++g) bs[g] = load_4_whole(b + k * T::kN + g * T::kGroup + 4 * me.x);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) s[r][j] = fma(get(as[r / 4], r % 4), get(bs[j / 4], j % 4), s[r][j]);
          }
        }
      }
    }
  }
}

// Rounding grows with the length of a chain of sums. After every kChain channels the sums so far move to this thread's
// places of p, where they are added up; take_sums brings them back.
template <class T>
__device__ __forceinline__ void put_sums(const Place& me, float* p, bool first,
                                         float (&s)[kRows][4 * T::kColumnGroups]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float* at = p + (kRows * me.y + r) * T::kPStride + 4 * me.x;
    const float4 old = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : load_4(at);
    store_4(at, add(s[r][0], old.x), add(s[r][1], old.y), add(s[r][2], old.z), add(s[r][3], old.w));
#pragma unroll
    for (int j = 0; j < 4; ++j) s[r][j] = 0.0f;
  }
}
template <class T>
__device__ __forceinline__ void take_sums(const Place& me, const float* p, float (&s)[kRows][4 * T::kColumnGroups]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float4 old = load_4(p + (kRows * me.y + r) * T::kPStride + 4 * me.x);
    s[r][0] = add(s[r][0], old.x);
    s[r][1] = add(s[r][1], old.y);
    s[r][2] = add(s[r][2], old.z);
    s[r][3] = add(s[r][3], old.w);
  }
}

// Step `depth` of `depths` of a product over all channels. p is free to use.
template <class T, Order order>
__device__ __forceinline__ void multiply_step(const Place& me, const float* stage, int depth, int dim, float* p,
                                              float (&s)[kRows][4 * T::kColumnGroups]) {
  constexpr int kSteps = kChain / kDepth;
  const int n = dim - depth * kDepth;
  multiply<T, order>(me, stage, n < kDepth ? n : kDepth, s);
  if constexpr (T::kChannels > kChain) {
    static_assert(T::kColumnGroups == 1);
    if (n <= kDepth) {
      if (depth >= kSteps) take_sums<T>(me, p, s);
    } else if (depth % kSteps == kSteps - 1) {
      put_sums<T>(me, p, depth < kSteps, s);
    }
  }
}

// acc[r][4 group + i] += the products of 4 columns. p: row 8 y of the first of them; x: its first channel of the group
// (tokens), or the first of the 4 columns of the group's first channel (planes), of this thread.
template <class T, Order order, int kWidth>
__device__ __forceinline__ void accumulate_4(const float* p, const float* x, int group, float (&acc)[kRows][kWidth]) {
  float4 xs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    xs[i] = load_4_whole(x + i * (order == Order::tokens ? T::kChannels : T::kX * T::kChunkStride));
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float4 ps = load_4(p + r * T::kPStride);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float v = order == Order::tokens ? get(xs[k], i) : get(xs[i], k);
        acc[r][4 * group + i] = fma(get(ps, k), v, acc[r][4 * group + i]);
      }
    }
  }
}

// x: a stage that copy_chunk filled; p: the kM rows of a group of columns, from the first column of the chunk on.
template <class T, Order order>
__device__ __forceinline__ void accumulate(const Place& me, const float* p, const float* x, int dim,
                                           float (&acc)[kRows][4 * T::kChannelGroups]) {
  constexpr int kAlong = order == Order::tokens ? 1 : T::kChunkStride;  // to the next channel
  constexpr int kNext = order == Order::tokens ? T::kChannels : 1;      // to the next column
  p += kRows * me.y * T::kPStride;
#pragma unroll
  for (int g = 0; g < T::kChannelGroups; ++g) {
    if (g > 0 && g * T::kGroup >= dim) break;
    // threads beyond the last channel read the last ones, and keep what they get to themselves
    const int last = dim / 4 - g * T::kX - 1, at = me.x < last ? me.x : last;
    const float* from = x + (g * T::kGroup + (order == Order::tokens ? 4 * at : at)) * kAlong;
    if constexpr (T::kSums) {
      float sum[kRows][4] = {};
#pragma unroll 2
      for (int column = 0; column < T::kChunk; column += 4) {
        accumulate_4<T, order>(p + column, from + column * kNext, 0, sum);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[r][4 * g + i] = add(acc[r][4 * g + i], sum[r][i]);
      }
    } else {
#pragma unroll
      for (int column = 0; column < T::kChunk; column += 4) {
        accumulate_4<T, order>(p + column, from + column * kNext, g, acc);
      }
    }
  }
}

// This thread's part of a group of columns to shared memory, for `accumulate`.
template <class T, int kColumns>
__device__ __forceinline__ void write_p(const Place& me, float* p, int group, const float (&s)[kRows][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    store_4(p + (kRows * me.y + r) * T::kPStride + 4 * me.x, s[r][4 * group], s[r][4 * group + 1], s[r][4 * group + 2],
            s[r][4 * group + 3]);
  }
}

// acc[r][..] * factor(r) to rows first + 8 y + r < to.count, in any order and alignment.
template <class T, class Factor>
__device__ __forceinline__ void store_rows(const Place& me, const Matrix& to, int64_t first, int dim,
                                           const Factor& factor, const float (&acc)[kRows][4 * T::kChannelGroups]) {
  const int64_t start = first + kRows * me.y;
  const int rows = clamp(to.count - start, kRows);
  float* base = to.data + start * to.token;
#pragma unroll
  for (int g = 0; g < T::kChannelGroups; ++g) {
    const int c = g * T::kGroup + 4 * me.x;
    if (c >= dim) break;
    if (to.whole && to.channel == 1) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float f = factor(r);
        if (r < rows) {
          store_4(base + r * to.token + c, acc[r][4 * g] * f, acc[r][4 * g + 1] * f, acc[r][4 * g + 2] * f,
                  acc[r][4 * g + 3] * f);
        }
      }
    } else if (to.whole && rows == kRows) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; r += 4) {
          store_4(base + (c + i) * to.channel + r, acc[r][4 * g + i] * factor(r), acc[r + 1][4 * g + i] * factor(r + 1),
                  acc[r + 2][4 * g + i] * factor(r + 2), acc[r + 3][4 * g + i] * factor(r + 3));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r < rows) base[r * to.token + (c + i) * to.channel] = acc[r][4 * g + i] * factor(r);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- launch
// One block a tile of rows of a head, heads of all samples one after the other.
template <class T, class Params>
int launch_tiles(void (*kernel)(Params), int64_t rows, int64_t heads, int bytes, cudaStream_t stream,
                 const Params& params) {
  const int64_t tiles = (rows + T::kM - 1) / T::kM;
  if (tiles == 0 || heads == 0) return cudaSuccess;
  if (tiles > 0x7fffffff / heads) return cudaErrorInvalidConfiguration;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaSuccess;
  if (bytes > 48 * 1024) {
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    status = cudaLaunchKernel(function, dim3(static_cast<unsigned>(tiles * heads)), dim3(T::kThreads), arguments,
                              static_cast<size_t>(bytes), stream);
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace dk::cuda::ffma
