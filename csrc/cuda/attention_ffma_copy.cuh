// Tiles of the exact float32 kernels: their sizes, and how they come from global into shared memory. What is done with
// them stands in attention_ffma.cuh.
#pragma once

#include "attention_launch.cuh"

namespace dk::cuda::ffma {

constexpr int kDepth = 16;  // channels of a stage of `multiply`
constexpr int kRows = 8;    // rows of a thread

// kX x kY threads. Thread (x, y) has rows 8 y .. 8 y + 7 and, of each group of 4 kX columns (channels), 4 x .. 4 x + 3.
// kBlocks: on a multiprocessor, for the registers.
template <int kX_, int kY_, int kColumnGroups_, int kChannelGroups_, int kChunk_, int kBlocks_>
struct Tile {
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kX = kX_, kY = kY_, kThreads = kX * kY;
  static constexpr int kGroup = 4 * kX;
  static constexpr int kColumnGroups = kColumnGroups_, kChannelGroups = kChannelGroups_;
  static constexpr int kM = kRows * kY, kN = kGroup * kColumnGroups;
  static constexpr int kChannels = kGroup * kChannelGroups;  // the largest head dimension
  static constexpr int kChunk = kChunk_;                     // columns of a stage of `accumulate`
  static constexpr int kChunks = kGroup / kChunk;            // in a group of columns
  // Are the columns of a chunk summed before they are added to the sums of all columns? A few columns are not worth it.
  static constexpr bool kSums = kChunk >= 16;
  static constexpr int kPad = 4;
  static constexpr int kDepthStride = kDepth + kPad, kChunkStride = kChunk % 8 == 0 ? kChunk + kPad : kChunk;
  static constexpr int kPStride = kGroup + kPad;
  static constexpr int kPairFloats = (kM + kN) * kDepthStride, kChunkFloats = kChannels * kChunkStride;
  static constexpr int kStage = kPairFloats > kChunkFloats ? kPairFloats : kChunkFloats;
  static constexpr int kPFloats = kM * kPStride;
  static constexpr int kBytes = (2 * kStage + kPFloats) * static_cast<int>(sizeof(float));
};

// The axis that is contiguous in shared memory, and in global memory where copies are 16 bytes.
enum class Order {
  tokens,  // channels of a token are neighbours
  planes,  // tokens of a channel are neighbours
};

// ------------------------------------------------------------------------------------------------------- operands
// A tensor as the host describes it. whole: its order is that of the kernel and its rows are 16-byte aligned.
struct Operand {
  HeadsView view;
  bool whole;
};

inline Order order_of(const HeadsView& view) { return view.channel == 1 ? Order::tokens : Order::planes; }

inline bool is_whole(const HeadsView& view, Order order) {
  const int64_t along = order == Order::tokens ? view.channel : view.token;
  const int64_t across = order == Order::tokens ? view.token : view.channel;
  return along == 1 && across % 4 == 0 && view.batch % 4 == 0 && view.head % 4 == 0 &&
         reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

inline Operand operand(const HeadsView& view, Order order) { return {view, is_whole(view, order)}; }
// Results are stored in their own order; whole: 16 bytes at a time.
inline Operand result(const HeadsView& view) { return {view, is_whole(view, order_of(view))}; }

// The order of most of what is read: an operand in the other order is copied one element at a time.
inline Order order_of_most(const AttentionProblem& problem) {
  const Order k = order_of(problem.k);
  return k == order_of(problem.v) ? k : order_of(problem.q);
}

// One head of an operand; tokens from `count` on are read as zeros. Kernels keep them in shared memory: in registers,
// everything that can be computed from them ahead would fill the registers that the products need.
struct Matrix {
  float* data;
  int64_t token, channel, count;
  bool whole;
};

__device__ __forceinline__ Matrix matrix_of(const Operand& operand, int64_t batch, int64_t head, int64_t tokens) {
  const HeadsView& view = operand.view;
  return {static_cast<float*>(view.data) + batch * view.batch + head * view.head, view.token, view.channel, tokens,
          operand.whole};
}

// --------------------------------------------------------------------------------------------------------- copies
// Global to shared memory, `valid` of the elements (4 of copy_16, 1 of copy_4), the others are zero and not read.
// Asynchronous from sm_80 on.
__device__ __forceinline__ void copy_16(float* to, const float* from, int valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(4 * valid)
      : "memory");
#else
  float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (valid == 4) {
    v = *reinterpret_cast<const float4*>(from);
  } else {
    if (valid > 0) v.x = from[0];
    if (valid > 1) v.y = from[1];
    if (valid > 2) v.z = from[2];
  }
  *reinterpret_cast<float4*>(to) = v;
#endif
}

__device__ __forceinline__ void copy_4(float* to, const float* from, int valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(4 * valid)
      : "memory");
#else
  *to = valid > 0 ? *from : 0.0f;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ __forceinline__ int clamp(int64_t n, int most) { return n < 0 ? 0 : n < most ? static_cast<int>(n) : most; }

// Columns (channels) 4 x + i of a group stand at position kX i + x: neighbouring threads read neighbouring rows.
template <class T>
__host__ __device__ constexpr int position_of(int column) {
  return column / T::kGroup * T::kGroup + column % 4 * T::kX + column % T::kGroup / 4;
}
template <class T>
__host__ __device__ constexpr int column_at(int position) {
  return position / T::kGroup * T::kGroup + position % T::kX * 4 + position % T::kGroup / T::kX;
}

// Channels depth .. depth + n - 1 of kCount tokens from `first` on, an operand of `multiply`.
// tokens: [kCount][kDepthStride], planes: [kDepth][kCount].
template <class T, Order order, int kCount, bool kPermuted>
__device__ __forceinline__ void copy_pair(float* to, const Matrix& from, int64_t first, int depth, int n) {
  const int thread = static_cast<int>(threadIdx.x), left = clamp(from.count - first, kCount);
  const float* base = from.data + first * from.token + depth * from.channel;
  if (!from.whole) {
    const bool along = from.channel == 1;  // a warp reads neighbouring addresses
#pragma unroll 1
    for (int i = thread; i < kCount * kDepth; i += T::kThreads) {
      const int row = along ? i / kDepth : i % kCount, channel = along ? i % kDepth : i / kCount;
      const int position = kPermuted ? position_of<T>(row) : row;
      if (channel < n) {
        copy_4(to + (order == Order::tokens ? position * T::kDepthStride + channel : channel * kCount + row),
               base + row * from.token + channel * from.channel, row < left);
      }
    }
  } else if constexpr (order == Order::tokens) {
    constexpr int kUnits = kDepth / 4, kRowsATime = T::kThreads / kUnits;
    constexpr int kStep = kPermuted ? column_at<T>(kRowsATime) : kRowsATime;
    static_assert(kCount <= 2 * kRowsATime || !kPermuted);
    // 8 rows by 4 units a warp: stores without bank conflicts
    const int unit = thread / 8 % kUnits, position = thread / (8 * kUnits) * 8 + thread % 8;
    const int row = kPermuted ? column_at<T>(position) : position;
    const int64_t step = kStep * from.token;
    base += row * from.token + 4 * unit;
    to += position * T::kDepthStride + 4 * unit;
    if (4 * unit >= n) return;
#pragma unroll
    for (int i = 0; i < kCount / kRowsATime; ++i, base += step) {
      copy_16(to + i * kRowsATime * T::kDepthStride, base, row + i * kStep < left ? 4 : 0);
    }
  } else {
    constexpr int kUnits = kCount / 4, kRowsATime = T::kThreads / kUnits;
    const int unit = thread % kUnits, row = thread / kUnits, valid = clamp(left - 4 * unit, 4);
    const int64_t step = kRowsATime * from.channel;
    base += row * from.channel + 4 * unit;
    to += row * kCount + 4 * unit;
#pragma unroll
    for (int start = 0; start < kDepth; start += kRowsATime, base += step) {
      if (row + start < n) copy_16(to + start * kCount, base, valid);
    }
  }
}

// A stage of `multiply`: rows and columns of the tile that begins there.
template <class T, Order order>
__device__ __forceinline__ void copy_pairs(float* to, const Matrix& rows, int64_t row, const Matrix& columns,
                                           int64_t column, int depth, int dim) {
  const int n = dim - depth < kDepth ? dim - depth : kDepth;
  copy_pair<T, order, T::kM, false>(to, rows, row, depth, n);
  copy_pair<T, order, T::kN, true>(to + T::kM * (order == Order::tokens ? T::kDepthStride : kDepth), columns, column,
                                   depth, n);
}

// kChunk tokens from `first` on, all their channels, operand x of `accumulate`.
// tokens: [kChunk][kChannels], planes: [kChannels][kChunkStride].
template <class T, Order order>
__device__ __forceinline__ void copy_chunk(float* to, const Matrix& from, int64_t first, int dim) {
  const int thread = static_cast<int>(threadIdx.x), left = clamp(from.count - first, T::kChunk);
  const float* base = from.data + first * from.token;
  if (!from.whole) {
    const bool along = from.channel == 1;
#pragma unroll 1
    for (int i = thread; i < T::kChunk * T::kChannels; i += T::kThreads) {
      const int token = along ? i / T::kChannels : i % T::kChunk, channel = along ? i % T::kChannels : i / T::kChunk;
      if (channel < dim) {
        copy_4(to + (order == Order::tokens ? token * T::kChannels + channel
                                            : position_of<T>(channel) * T::kChunkStride + token),
               base + token * from.token + channel * from.channel, token < left);
      }
    }
  } else if constexpr (order == Order::tokens) {
    constexpr int kUnits = T::kChannels / 4, kRowsATime = T::kThreads / kUnits;
    const int unit = thread % kUnits, row = thread / kUnits;
    const int64_t step = kRowsATime * from.token;
    base += row * from.token + 4 * unit;
    to += row * T::kChannels + 4 * unit;
    if (4 * unit >= dim) return;
#pragma unroll
    for (int start = 0; start < T::kChunk; start += kRowsATime, base += step) {
      copy_16(to + start * T::kChannels, base, row + start < left ? 4 : 0);
    }
  } else {
    constexpr int kUnits = T::kChunk / 4, kRowsATime = T::kThreads / kUnits;
    const int unit = thread / 8 % kUnits, position = thread / (8 * kUnits) * 8 + thread % 8;
    const int channel = column_at<T>(position), valid = clamp(left - 4 * unit, 4);
    const int64_t stride = from.channel;
    base += channel * stride + 4 * unit;
    to += position * T::kChunkStride + 4 * unit;
#pragma unroll
    for (int start = 0; start < T::kChannels; start += kRowsATime) {
      const int skipped = column_at<T>(start);
      if (channel + skipped < dim) copy_16(to + start * T::kChunkStride, base + skipped * stride, valid);
    }
  }
}

// The two stages: while a step works on one, the copies of the next step go to the other.
template <class T>
struct Stages {
  float* shared;
  int current = 0;

  // copy(to): copies of the next step; work(from): this step, on what the copies of the last step brought.
  template <class Copy, class Work>
  __device__ __forceinline__ void step(const Copy& copy, const Work& work) {
    wait_for_copies();
    __syncthreads();
    copy(shared + (current ^ 1) * T::kStage);
    work(shared + current * T::kStage);
    current ^= 1;
  }
};

}  // namespace dk::cuda::ffma
