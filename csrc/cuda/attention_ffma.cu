// softmax(scale Q K^T) V in exact float32: rows are queries, columns are keys.
#include "attention_ffma.cuh"

namespace dk::cuda {
namespace ffma {
namespace {

// Stages of 16 channels, and of 32, 16, 8 or 4 keys: the more channels, the fewer keys fit.
using Tile64 = Tile<8, 16, 2, 2, 32, 2>;
using Tile128 = Tile<16, 8, 1, 2, 16, 2>;
using Tile256 = Tile<16, 8, 1, 4, 8, 2>;
using Tile512 = Tile<32, 8, 1, 4, 4, 1>;

struct ForwardParams {
  Operand q, k, v, out;  // out.whole: 16-byte stores
  float* lse;
  Partials partials;  // null pointers: out and lse are written
  int64_t heads, queries, keys, splits, keys_per_split;
  int dim;
  float scale;  // times log2(e)
};

template <class T, Order order>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) attention_forward(const ForwardParams params) {
  extern __shared__ __align__(16) float shared[];
  constexpr int kColumns = 4 * T::kColumnGroups;
  const Place me = place<T>();
  const unsigned tiles = static_cast<unsigned>((params.queries + T::kM - 1) / T::kM);
  const unsigned splits = static_cast<unsigned>(params.splits), heads = static_cast<unsigned>(params.heads);
  const unsigned split = blockIdx.x / tiles % splits, unit = blockIdx.x / tiles / splits;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % tiles) * T::kM;
  const int64_t begin = split * params.keys_per_split;
  const int64_t end = params.keys - begin < params.keys_per_split ? params.keys : begin + params.keys_per_split;
  const int dim = params.dim, depths = (dim + kDepth - 1) / kDepth;

  __shared__ Matrix q, k, v;
  if (threadIdx.x == 0) {
    q = matrix_of(params.q, unit / heads, unit % heads, params.queries);
    k = matrix_of(params.k, unit / heads, unit % heads, end);
    v = matrix_of(params.v, unit / heads, unit % heads, end);
  }
  __syncthreads();
  Stages<T> stages{shared};
  float* p = shared + 2 * T::kStage;

  const auto copy_qk = [&](float* to, int64_t first, int depth) {
    copy_pairs<T, order>(to, q, first_row, k, first, depth * kDepth, dim);
  };

  float acc[kRows][4 * T::kChannelGroups] = {}, max[kRows], sum[kRows] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r) max[r] = -INFINITY;

  copy_qk(shared, begin, 0);
  for (int64_t first = begin; first < end; first += T::kN) {
    const int columns = clamp(end - first, T::kN), chunks = (columns + T::kChunk - 1) / T::kChunk;
    float s[kRows][kColumns] = {};
#pragma unroll 1
    for (int i = 0; i < depths; ++i) {
      stages.step(
          [&](float* to) {
            if (i + 1 < depths) {
              copy_qk(to, first, i + 1);
            } else {
              copy_chunk<T, order>(to, v, first, dim);
            }
          },
          [&](const float* from) { multiply_step<T, order>(me, from, i, dim, p, s); });
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) s[r][j] *= params.scale;
    }
    if (columns < T::kN) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (j / 4 * T::kGroup + 4 * me.x + j % 4 >= columns) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) s[r][j] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float most = -INFINITY;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) most = fmaxf(most, s[r][j]);
#pragma unroll
      for (int lane = 1; lane < T::kX; lane *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, lane));
      float base;
      const float factor = softmax_advance(FastPowers{}, max[r], most, base);
      sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < 4 * T::kChannelGroups; ++j) acc[r][j] *= factor;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        s[r][j] = softmax_weight(FastPowers{}, s[r][j], base);
        sum[r] += s[r][j];
      }
    }

#pragma unroll
    for (int g = 0; g < T::kColumnGroups; ++g) {
      __syncwarp();  // the lanes have read what stood here
      write_p<T>(me, p, g, s);
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < T::kChunks && g * T::kChunks + i < chunks; ++i) {
        const int next = g * T::kChunks + i + 1;
        stages.step(
            [&](float* to) {
              if (next < chunks) {
                copy_chunk<T, order>(to, v, first + next * T::kChunk, dim);
              } else if (first + T::kN < end) {
                copy_qk(to, first + T::kN, 0);
              }
            },
            [&](const float* from) { accumulate<T, order>(me, p + i * T::kChunk, from, dim, acc); });
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int lane = 1; lane < T::kX; lane *= 2) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], lane);
  }
  const int64_t start = first_row + kRows * me.y;
  if (params.partials.out == nullptr) {
    const Matrix out = matrix_of(params.out, unit / heads, unit % heads, params.queries);
    float inverse[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) inverse[r] = 1.0f / sum[r];
    store_rows<T>(me, out, first_row, dim, [&](int r) { return inverse[r]; }, acc);
    float* lse = params.lse + unit * params.queries + start;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (me.x == 0 && start + r < params.queries) lse[r] = log_sum_exp(max[r], sum[r]);
    }
  } else {
    const int64_t at = (static_cast<int64_t>(split) * (gridDim.x / tiles / splits) + unit) * params.queries;
    const Matrix out{params.partials.out + at * dim, dim, 1, params.queries, true};
    store_rows<T>(me, out, first_row, dim, [](int) { return 1.0f; }, acc);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (me.x == 0 && start + r < params.queries) {
        params.partials.max[at + start + r] = max[r];
        params.partials.sum[at + start + r] = sum[r];
      }
    }
  }
}

template <class T>
int run(Order order, int64_t heads, cudaStream_t stream, const ForwardParams& params) {
  const auto kernel =
      order == Order::tokens ? attention_forward<T, Order::tokens> : attention_forward<T, Order::planes>;
  return launch_tiles<T>(kernel, params.queries, heads, T::kBytes, stream, params);
}

}  // namespace
}  // namespace ffma

int attention_ffma(const AttentionArgs& args, const Split& split, cudaStream_t stream) {
  using namespace ffma;
  const AttentionProblem& problem = args.problem;
  const Order order = order_of_most(problem);
  const ForwardParams params{operand(problem.q, order),
                             operand(problem.k, order),
                             operand(problem.v, order),
                             result(args.out),
                             static_cast<float*>(args.lse),
                             split.count > 1 ? attention_partials(args, split.count) : Partials{},
                             problem.heads,
                             problem.queries,
                             problem.keys,
                             split.count,
                             split.keys,
                             static_cast<int>(problem.dim),
                             static_cast<float>(problem.scale * kLog2E)};
  const int64_t heads = problem.batch * problem.heads * split.count;
  if (problem.dim <= Tile64::kChannels) return run<Tile64>(order, heads, stream, params);
  if (problem.dim <= Tile128::kChannels) return run<Tile128>(order, heads, stream, params);
  if (problem.dim <= Tile256::kChannels) return run<Tile256>(order, heads, stream, params);
  return run<Tile512>(order, heads, stream, params);
}

}  // namespace dk::cuda
