// The gradients of attention in exact float32, without atomics: one kernel owns tiles of keys and walks over the
// queries (dk, dv), one owns tiles of queries and walks over the keys (dq). They are the same kernel with rows and
// columns exchanged:
//   p[row][column] = exp(scale a_row.a_column - lse)       a: k and q; or q and k
//   first[row] = sum of p b_column                         b: v and grad_out; first: dv
//   ds = p (b_row.b_column - delta)
//   second[row] = scale sum of ds a_column                 second: dk; or dq
#include "attention_ffma.cuh"
#include "attention_grad_launch.cuh"

namespace dk::cuda {
namespace ffma {
namespace {

using Tile64 = Tile<16, 8, 1, 1, 32, 3>;
using Tile128 = Tile<16, 8, 1, 2, 16, 2>;
using Tile256 = Tile<16, 8, 1, 4, 8, 2>;
using Tile512 = Tile<32, 8, 1, 4, 4, 1>;

struct GradParams {
  Operand a_row, a_column, b_row, b_column;
  Operand first, second;  // whole: 16-byte stores
  const float *lse, *delta;
  int64_t heads, rows, columns;
  bool by_row;  // rows are queries
  int dim;
  float log2_scale, scale;
};

// Sums over more channels than this move out of the registers now and then (put_sums), and p must stay meanwhile.
template <class T>
constexpr bool kSecondP = T::kChannels > 2 * kChain;
template <class T, bool kSecond>
constexpr int kGradBytes = T::kBytes + (kSecond && kSecondP<T> ? T::kPFloats * static_cast<int>(sizeof(float)) : 0);

// exp(x - lse) for logits in base 2, rounded as in the forward pass, from lse in two parts: p is as exact as the
// float32 lse allows.
struct Shift {
  float high, low;
};
__device__ __forceinline__ Shift shift_of(float lse) {
  constexpr float kHigh = 1.44269502f, kLow = 1.92596299e-8f;
  const float high = mul(lse, kHigh);
  return {high, fma(lse, kLow, fma(lse, kHigh, -high))};
}

// s[r][j] = f(s[r][j], term of the query), 0 outside of the tensors.
template <class T, class Term, class Make, class F>
__device__ __forceinline__ void for_each_query(const Place& me, bool by_row, const float* values, int rows, int columns,
                                               const Make& make, const F& f, float (&s)[kRows][4]) {
  if (by_row) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = kRows * me.y + r;
      const Term term = make(row < rows ? values[row] : 0.0f);
#pragma unroll
      for (int j = 0; j < 4; ++j) s[r][j] = row < rows && 4 * me.x + j < columns ? f(r, j, s[r][j], term) : 0.0f;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = 4 * me.x + j;
      const Term term = make(column < columns ? values[column] : 0.0f);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        s[r][j] = column < columns && kRows * me.y + r < rows ? f(r, j, s[r][j], term) : 0.0f;
      }
    }
  }
}

// Two sets of sums need more registers than three blocks leave.
template <class T, bool kBoth>
constexpr int kGradBlocks = kBoth && T::kBlocks > 2 ? 2 : T::kBlocks;

template <class T, Order order, bool kFirst, bool kSecond>
__global__ void __launch_bounds__(T::kThreads, (kGradBlocks<T, kFirst && kSecond>))
    attention_backward(const GradParams params) {
  extern __shared__ __align__(16) float shared[];
  static_assert(T::kColumnGroups == 1);
  const Place me = place<T>();
  const unsigned tiles = static_cast<unsigned>((params.rows + T::kM - 1) / T::kM);
  const unsigned heads = static_cast<unsigned>(params.heads), unit = blockIdx.x / tiles;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x % tiles) * T::kM;
  const int rows = clamp(params.rows - first_row, T::kM);
  const int dim = params.dim, depths = (dim + kDepth - 1) / kDepth;

  __shared__ Matrix a_row, a_column, b_row, b_column;
  if (threadIdx.x == 0) {
    a_row = matrix_of(params.a_row, unit / heads, unit % heads, params.rows);
    a_column = matrix_of(params.a_column, unit / heads, unit % heads, params.columns);
    b_row = matrix_of(params.b_row, unit / heads, unit % heads, params.rows);
    b_column = matrix_of(params.b_column, unit / heads, unit % heads, params.columns);
  }
  __syncthreads();
  Stages<T> stages{shared};
  float* p = shared + 2 * T::kStage;
  float* sums = kSecondP<T> ? p + T::kPFloats : nullptr;  // of the second product

  const auto copy_a = [&](float* to, int64_t column, int depth) {
    copy_pairs<T, order>(to, a_row, first_row, a_column, column, depth, dim);
  };
  const auto copy_b = [&](float* to, int64_t column, int depth) {
    copy_pairs<T, order>(to, b_row, first_row, b_column, column, depth, dim);
  };
  const auto copy_next_tile = [&](float* to, int64_t column) {
    if (column + T::kN < params.columns) copy_a(to, column + T::kN, 0);
  };

  float first[kRows][4 * T::kChannelGroups] = {}, second[kRows][4 * T::kChannelGroups] = {};
  copy_a(shared, 0, 0);
  for (int64_t column = 0; column < params.columns; column += T::kN) {
    const int columns = clamp(params.columns - column, T::kN), chunks = (columns + T::kChunk - 1) / T::kChunk;
    const int64_t query = unit * (params.by_row ? params.rows : params.columns) + (params.by_row ? first_row : column);
    {
      float s[kRows][4] = {};
#pragma unroll 1
      for (int i = 0; i < depths; ++i) {
        stages.step(
            [&](float* to) {
              if (i + 1 < depths) {
                copy_a(to, column, (i + 1) * kDepth);
              } else if (kFirst) {
                copy_chunk<T, order>(to, b_column, column, dim);
              } else {
                copy_b(to, column, 0);
              }
            },
            [&](const float* from) { multiply_step<T, order>(me, from, i, dim, p, s); });
      }
      for_each_query<T, Shift>(
          me, params.by_row, params.lse + query, rows, columns, shift_of,
          [&](int, int, float v, const Shift& shift) {
            return exp2_fast(sub(sub(mul(v, params.log2_scale), shift.high), shift.low));
          },
          s);
      __syncwarp();  // the lanes have read what stood here
      write_p<T>(me, p, 0, s);
      __syncwarp();
    }
    if constexpr (kFirst) {
#pragma unroll 1
      for (int i = 0; i < chunks; ++i) {
        stages.step(
            [&](float* to) {
              if (i + 1 < chunks) {
                copy_chunk<T, order>(to, b_column, column + (i + 1) * T::kChunk, dim);
              } else if (kSecond) {
                copy_b(to, column, 0);
              } else {
                copy_next_tile(to, column);
              }
            },
            [&](const float* from) { accumulate<T, order>(me, p + i * T::kChunk, from, dim, first); });
      }
    }
    if constexpr (kSecond) {
      float s[kRows][4] = {};
#pragma unroll 1
      for (int i = 0; i < depths; ++i) {
        stages.step(
            [&](float* to) {
              if (i + 1 < depths) {
                copy_b(to, column, (i + 1) * kDepth);
              } else {
                copy_chunk<T, order>(to, a_column, column, dim);
              }
            },
            [&](const float* from) {
              if constexpr (kSecondP<T>) {
                multiply_step<T, order>(me, from, i, dim, sums, s);
              } else {
                multiply<T, order>(me, from, dim - i * kDepth < kDepth ? dim - i * kDepth : kDepth, s);
              }
            });
      }
      float4 ps[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) ps[r] = load_4(p + (kRows * me.y + r) * T::kPStride + 4 * me.x);
      for_each_query<T, float>(
          me, params.by_row, params.delta + query, rows, columns, [](float delta) { return delta; },
          [&](int r, int j, float v, float delta) {
            return softmax_gradient(SoftmaxScalars{}, get(ps[r], j), v, delta);
          },
          s);
      __syncwarp();
      write_p<T>(me, p, 0, s);
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < chunks; ++i) {
        stages.step(
            [&](float* to) {
              if (i + 1 < chunks) {
                copy_chunk<T, order>(to, a_column, column + (i + 1) * T::kChunk, dim);
              } else {
                copy_next_tile(to, column);
              }
            },
            [&](const float* from) { accumulate<T, order>(me, p + i * T::kChunk, from, dim, second); });
      }
    }
  }

  if constexpr (kFirst) {
    const Matrix to = matrix_of(params.first, unit / heads, unit % heads, params.rows);
    store_rows<T>(me, to, first_row, dim, [](int) { return 1.0f; }, first);
  }
  if constexpr (kSecond) {
    const Matrix to = matrix_of(params.second, unit / heads, unit % heads, params.rows);
    store_rows<T>(me, to, first_row, dim, [&](int) { return params.scale; }, second);
  }
}

template <class T, bool kFirst, bool kSecond>
int run(Order order, int64_t heads, cudaStream_t stream, const GradParams& params) {
  const auto kernel = order == Order::tokens ? attention_backward<T, Order::tokens, kFirst, kSecond>
                                             : attention_backward<T, Order::planes, kFirst, kSecond>;
  return launch_tiles<T>(kernel, params.rows, heads, kGradBytes<T, kSecond>, stream, params);
}

// kBoth: dv and dk by one kernel, as their sums fit into the registers; else by one each.
template <class T, bool kBoth>
int run_all(Order order, int64_t heads, cudaStream_t stream, const GradParams& by_key, const GradParams& by_query) {
  int status;
  if constexpr (kBoth) {
    status = run<T, true, true>(order, heads, stream, by_key);
  } else {
    status = run<T, true, false>(order, heads, stream, by_key);
    if (status == cudaSuccess) status = run<T, false, true>(order, heads, stream, by_key);
  }
  return status != cudaSuccess ? status : run<T, false, true>(order, heads, stream, by_query);
}

}  // namespace
}  // namespace ffma

int attention_grad_ffma(const AttentionGradArgs& args, const float* delta, cudaStream_t stream) {
  using namespace ffma;
  const AttentionProblem& problem = args.problem;
  const Order order = order_of_most(problem);
  const Operand q = operand(problem.q, order), k = operand(problem.k, order), v = operand(problem.v, order),
                grad_out = operand(args.grad_out, order);
  GradParams by_key{};
  by_key.lse = static_cast<const float*>(args.lse);
  by_key.delta = delta;
  by_key.heads = problem.heads;
  by_key.dim = static_cast<int>(problem.dim);
  by_key.log2_scale = static_cast<float>(problem.scale * kLog2E);
  by_key.scale = static_cast<float>(attention_grad_scale(problem));
  GradParams by_query = by_key;
  by_key.rows = problem.keys;
  by_key.columns = problem.queries;
  by_key.a_row = k;
  by_key.a_column = q;
  by_key.b_row = v;
  by_key.b_column = grad_out;
  by_key.first = result(args.dv);
  by_key.second = result(args.dk);
  by_query.by_row = true;
  by_query.rows = problem.queries;
  by_query.columns = problem.keys;
  by_query.a_row = q;
  by_query.a_column = k;
  by_query.b_row = grad_out;
  by_query.b_column = v;
  by_query.second = result(args.dq);
  const int64_t heads = problem.batch * problem.heads;
  if (problem.dim <= Tile64::kChannels) return run_all<Tile64, true>(order, heads, stream, by_key, by_query);
  if (problem.dim <= Tile128::kChannels) return run_all<Tile128, true>(order, heads, stream, by_key, by_query);
  if (problem.dim <= Tile256::kChannels) return run_all<Tile256, false>(order, heads, stream, by_key, by_query);
  return run_all<Tile512, false>(order, heads, stream, by_key, by_query);
}

}  // namespace dk::cuda
