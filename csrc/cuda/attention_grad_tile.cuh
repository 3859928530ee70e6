// How the backward attention kernels move tiles of tokens x channels: one name for both axis orders.
#pragma once

#include <type_traits>

#include "attention_tile.cuh"

namespace dk::cuda::grad {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

__device__ __forceinline__ float2 load_shared_pair(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}

// One head of a tensor as a matrix: rows are tokens, or (by_token) rows run along tokens.
struct Operand {
  Matrix matrix;
  int64_t batch, head;

  __device__ __forceinline__ Matrix at(int64_t b, int64_t h) const {
    Matrix m = matrix;
    m.data += b * batch + h * head;
    return m;
  }
};

inline Operand operand(const HeadsView& v, bool by_token, const AttentionProblem& problem, int64_t tokens) {
  const int64_t along = by_token ? v.token : v.channel, across = by_token ? v.channel : v.token;
  const int64_t length = by_token ? tokens : problem.dim;
  const bool chunks = along == 1 && length % kChunk == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 &&
                      across % kChunk == 0 && (problem.batch <= 1 || v.batch % kChunk == 0) &&
                      (problem.heads <= 1 || v.head % kChunk == 0);
  const Reach reach = chunks ? Reach::chunks : along == 1 || length == 1 ? Reach::columns : Reach::rows;
  return {{static_cast<uint16_t*>(v.data), across, along, reach}, v.batch, v.head};
}

// kByToken: rows of the tile run along tokens, else along channels.
template <int kTokens, int kDim, bool kByToken>
struct Side {
  using T = std::conditional_t<kByToken, Tile<kDim, kTokens / kChunk>, Tile<kTokens, kDim / kChunk>>;
  // Blocks of 16 x 16 as the left factor of a product that sums over channels, and as the right factor of one that sums
  // over channels or over tokens.
  using Rows = Loader<T, kByToken ? Order::across : Order::down, kByToken>;
  using Channels = Loader<T, kByToken ? Order::down : Order::across, kByToken>;
  using Tokens = Loader<T, kByToken ? Order::across : Order::down, !kByToken>;

  template <class L>
  static __device__ __forceinline__ void load(const L& loader, uint32_t (&r)[4], int token, int channel) {
    if constexpr (kByToken) {
      loader.load(r, channel, token / kChunk);
    } else {
      loader.load(r, token, channel / kChunk);
    }
  }

  // The tile from a channel on, a multiple of 64.
  static __device__ __forceinline__ T from_channel(T tile, int channel) {
    return {tile.base + static_cast<uint32_t>(channel * (kByToken ? T::kPitch : 2))};
  }

  static __device__ __forceinline__ Window window(int64_t first, int64_t count, int dim, int live_tokens,
                                                  int live_channels) {
    const int there = clip(count - first, kTokens);
    return kByToken ? Window{0, first, dim, there, live_channels, live_tokens}
                    : Window{first, 0, there, dim, live_tokens, live_channels};
  }

  // Tokens from `first` on of some operands into neighbouring tiles, in any way the strides allow. Tokens that are not
  // there are 0, and so are channels up to a multiple of 16. (A loop, for it is much code.)
  static __device__ __forceinline__ void fill(T tile, const Operand* operands, int number, int64_t b, int64_t h,
                                              int64_t first, int64_t count, int dim) {
    const Window w = window(first, count, dim, kTokens, (dim + 15) & ~15);
#pragma unroll 1
    for (int i = 0; i < number; ++i) {
      load_tile(T{tile.base + i * T::kBytes}, operands[i].at(b, h), w, kThreads, static_cast<int>(threadIdx.x));
    }
  }

  // Channels dim .. dim + 7 of two neighbouring tiles become 0.
  static __device__ __forceinline__ void clear_half_step(T tile, int dim) {
    constexpr int kChunks = kByToken ? 8 * T::kChunks : T::kRows;
    for (int i = static_cast<int>(threadIdx.x); i < 2 * kChunks; i += kThreads) {
      const T at{tile.base + i / kChunks * T::kBytes};
      const int j = i % kChunks;
      const uint32_t to = kByToken ? at.chunk(dim + j / T::kChunks, j % T::kChunks) : at.chunk(j, dim / kChunk);
      store_shared(to, make_uint4(0, 0, 0, 0));
    }
  }

  // The accumulators of a warp, times `factor`, to its 16 tokens of a tile.
  template <class S, int kBlocks>
  static __device__ __forceinline__ void put(T tile, int token, const float (&v)[kBlocks][4], float factor, int dim) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (8 * j >= dim) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t two = pack<S>(__fmul_rn(v[j][2 * half], factor), __fmul_rn(v[j][2 * half + 1], factor));
        const int row = token + lane / 4 + 8 * half, channel = 8 * j + lane % 4 * 2;
        if constexpr (kByToken) {
          store_shared(tile.element(channel, row), static_cast<uint16_t>(two));
          store_shared(tile.element(channel + 1, row), static_cast<uint16_t>(two >> 16));
        } else {
          store_shared(tile.element(row, channel), two);
        }
      }
    }
  }

  // Element by element, neighbouring threads along the rows, where these are what is contiguous.
  static __device__ __forceinline__ void store(T tile, const Matrix& m, int64_t first, int64_t count, int dim) {
    const Window w = window(first, count, dim, kTokens, dim);
    const int thread = static_cast<int>(threadIdx.x);
    if (m.reach != Reach::rows) return store_tile(tile, m, w, kThreads, thread);
#pragma unroll 1
    for (int i = thread; i < T::kRows * T::kChunks; i += kThreads) {
      const int row = i % T::kRows, column = i / T::kRows * kChunk;
      if (row >= w.rows || column >= w.columns) continue;
      const uint4 v = load_shared_chunk(tile.chunk(row, column / kChunk));
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
      uint16_t* const to = m.data + (w.first_row + row) * m.row + (w.first_column + column) * m.column;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (column + j < w.columns) to[j * m.column] = static_cast<uint16_t>(word[j / 2] >> (16 * (j % 2)));
      }
    }
  }

  // A whole tile of an operand that is reached in chunks; from: this thread's first chunk (copy_offset). Channels past
  // dim stay as they are.
  static __device__ __forceinline__ void copy(T tile, const uint16_t* from, int64_t row_stride, int dim) {
    constexpr int kPass = kThreads / T::kGroup;  // rows that all threads reach at once
    static_assert(T::kRows % kPass == 0 && kPass % 8 == 0);
    const int thread = static_cast<int>(threadIdx.x), row = thread / T::kGroup, chunk = thread % T::kGroup;
    const uint32_t to = tile.chunk(row, chunk);
#pragma unroll
    for (int i = 0; i < T::kRows / kPass; ++i) {
#pragma unroll
      for (int j = 0; j < T::kChunks; j += T::kGroup) {
        if ((kByToken ? row + i * kPass : (chunk + j) * kChunk) < dim) {
          copy_chunk(to + static_cast<uint32_t>(i * kPass * T::kPitch + j * 16), from + j * kChunk, true);
        }
      }
      from += kPass * row_stride;
    }
  }
  // From a tile to the next.
  static __device__ __forceinline__ int64_t advance(int64_t row_stride) {
    return kByToken ? kTokens : kTokens * row_stride;
  }
};

}  // namespace dk::cuda::grad
