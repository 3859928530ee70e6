// What the two forward kernels on tensor cores share: their arguments, the online softmax, the launch.
#pragma once

#include "attention_launch.cuh"
#include "attention_tile.cuh"

namespace dk::cuda {

// All heads of q, k, v or out.
struct Heads {
  uint16_t* data;
  int64_t batch, head, token, channel;
  Reach reach;         // of a tile in the orientation below
  bool channel_major;  // rows of a tile are channels: tokens are contiguous

  __device__ __forceinline__ Matrix matrix(uint32_t b, uint32_t h, bool by_channel) const {
    return {data + b * batch + h * head, by_channel ? channel : token, by_channel ? token : channel, reach};
  }
};

// Rows and columns of a tile of `tokens` x `channels` that are there.
__device__ __forceinline__ Extent make_extent(bool by_channel, int tokens, int live_tokens, int channels,
                                              int live_channels) {
  return by_channel ? Extent{channels, tokens, live_channels, live_tokens}
                    : Extent{tokens, channels, live_tokens, live_channels};
}
// The same, from the first token and channel given.
__device__ __forceinline__ Window make_window(bool by_channel, int64_t token, int64_t channel, const Extent& e) {
  return {by_channel ? channel : token, by_channel ? token : channel, e.rows, e.columns, e.live_rows, e.live_columns};
}

struct ForwardParams {
  Heads q, k, v, out;
  float* lse;
  Partials partials;  // used if splits > 1
  int64_t queries, keys, split_keys;
  uint32_t all_heads, heads;  // of the batch; of a sample
  uint32_t tiles, splits;     // blocks of a head: tiles of queries, fastest, times ranges of keys
  int dim, padded;            // padded: the next multiple of 16
  float scale;                // if `scaled`, logits become log2 ones in the exponent, by an fma
  bool scaled;                // false for a scale that is not positive: logits are multiplied first
};

// The place of a block: which queries of which head, which keys. Reads the block index anew wherever one is made:
// cheaper than to hold on to it.
struct Block {
  uint32_t index, sample, head, tile, split;  // index: among all heads of all samples

  __device__ __forceinline__ explicit Block(const ForwardParams& p) {
    uint32_t x, y, z;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(y));
    asm volatile("mov.u32 %0, %%ctaid.z;" : "=r"(z));
    index = z * gridDim.y + y;
    sample = index / p.heads;
    head = index % p.heads;
    split = x / p.tiles;
    tile = x % p.tiles;
  }
  __device__ __forceinline__ int64_t first_key(const ForwardParams& p) const { return split * p.split_keys; }
  __device__ __forceinline__ int64_t end_key(const ForwardParams& p) const {
    return split + 1 < p.splits ? first_key(p) + p.split_keys : p.keys;
  }
};

// Logits of 8 kN keys, of which the first `there` are there; lane 4 i + j holds keys 2 j and 2 j + 1 of each 8.
template <int kN>
__device__ __forceinline__ void finish_logits(const ForwardParams& p, float (&s)[kN][4], int there) {
  if (!p.scaled) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[n][e] *= p.scale;
    }
  }
  if (there < 8 * kN) {
    const int left = there - 2 * (static_cast<int>(threadIdx.x) & 3);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + (e & 1) >= left) s[n][e] = -INFINITY;
      }
    }
  }
}

// Largest logit of row `half` (0: lane / 4, 1: eight rows below) in this warp's keys.
template <int kN>
__device__ __forceinline__ float largest(const float (&s)[kN][4], int half) {
  float m = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
  for (int n = 1; n < kN; ++n) m = fmaxf(m, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
  return row_max(m);
}

// Logits of a row to their weights, exp2(factor s - base) in one rounding; returns the sum of this lane's.
template <int kN>
__device__ __forceinline__ float exponentiate(float (&s)[kN][4], int half, float factor, float base) {
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 2 * half; e < 2 * half + 2; ++e) {
      s[n][e] = exp2_fast(fmaf(s[n][e], factor, -base));
      sum += s[n][e];
    }
  }
  return sum;
}

// Row `query` of the head is done, up to the products with v.
__device__ __forceinline__ void store_sums(const ForwardParams& p, const Block& block, int64_t query, float maximum,
                                           float sum) {
  const int64_t at = int64_t{block.index} * p.queries + query;
  if (p.splits == 1) {
    p.lse[at] = maximum * kLn2 + logf(sum);
  } else {
    p.partials.max[int64_t{block.split} * p.all_heads * p.queries + at] = maximum;
    p.partials.sum[int64_t{block.split} * p.all_heads * p.queries + at] = sum;
  }
}

// Where the products of row `query` go if they are not all.
__device__ __forceinline__ float* partial_row(const ForwardParams& p, const Block& block, int64_t query) {
  return p.partials.out + ((int64_t{block.split} * p.all_heads + block.index) * p.queries + query) * p.dim;
}
__device__ __forceinline__ void store_pair(float* to, float a, float b) {
  *reinterpret_cast<float2*>(to) = make_float2(a, b);
}

// ------------------------------------------------------------------------------------------------------- host
inline Heads make_heads(const HeadsView& view, const AttentionProblem& problem, int64_t tokens, bool channel_major) {
  Heads h{
      static_cast<uint16_t*>(view.data), view.batch, view.head, view.token, view.channel, Reach::rows, channel_major};
  const int64_t row = channel_major ? view.channel : view.token, column = channel_major ? view.token : view.channel;
  const int64_t rows = channel_major ? problem.dim : tokens, columns = channel_major ? tokens : problem.dim;
  if (column == 1 || columns == 1) {
    const bool aligned = columns % kChunk == 0 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                         (rows == 1 || row % kChunk == 0) && (problem.heads == 1 || view.head % kChunk == 0) &&
                         (problem.batch == 1 || view.batch % kChunk == 0);
    h.reach = aligned ? Reach::chunks : Reach::columns;
  }
  return h;
}

inline bool is_channel_major(const HeadsView& view) { return view.channel != 1; }

inline int launch_forward(void (*kernel)(ForwardParams), ForwardParams& p, int rows, int threads, int shared,
                          cudaStream_t stream) {
  const int64_t tiles = (p.queries + rows - 1) / rows, blocks = tiles * p.splits, heads = p.all_heads;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  p.tiles = static_cast<uint32_t>(tiles);
  const unsigned z = slices(heads);
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>((heads + z - 1) / z), z);
    void* arguments[] = {&p};
    status = cudaLaunchKernel(function, grid, dim3(static_cast<unsigned>(threads)), arguments,
                              static_cast<size_t>(shared), stream);
  }
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

}  // namespace dk::cuda
