// The forward pass of attention: which family of kernels serves a problem, the split over keys and what combines it.
#include "attention_launch.cuh"
#include "memory.cuh"

namespace dk::cuda {
namespace {

constexpr int64_t kWantedBlocks = 128;  // about the multiprocessors of a large GPU
constexpr int64_t kLeastKeys = 512;     // of a range: less is not worth the traffic of its partial result
constexpr int64_t kMostSplits = 32;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ------------------------------------------------------------------------------------------------------- combine
constexpr int kTile = 32;  // queries and channels of a block
constexpr int kCombineRows = 8;

struct CombineParams {
  Partials partials;
  HeadsView out;
  float* lse;
  int64_t batch, heads, queries, dim, splits;
};

template <class S>
__global__ void __launch_bounds__(kTile* kCombineRows) attention_combine_kernel(const CombineParams p) {
  __shared__ float tile[kTile][kTile + 1];
  const int64_t index = block_sample(), all = p.batch * p.heads * p.queries;
  if (index >= p.batch * p.heads) return;
  const int64_t blocks = (p.dim + kTile - 1) / kTile;
  const int64_t first_query = blockIdx.x / blocks * kTile, first_channel = blockIdx.x % blocks * kTile;
  const int x = static_cast<int>(threadIdx.x) % kTile, y = static_cast<int>(threadIdx.x) / kTile;
  const int64_t channel = first_channel + x;
  for (int i = y; i < kTile && first_query + i < p.queries; i += kCombineRows) {
    const int64_t row = index * p.queries + first_query + i;
    float maximum = -INFINITY, total = 0, value = 0;
    for (int64_t s = 0; s < p.splits; ++s) maximum = fmaxf(maximum, p.partials.max[s * all + row]);
    const float base = ExactPowers::base(maximum);
    for (int64_t s = 0; s < p.splits; ++s) {
      const float weight = softmax_weight(ExactPowers{}, p.partials.max[s * all + row], base);
      total = fmaf(weight, p.partials.sum[s * all + row], total);
      if (channel < p.dim) value = fmaf(weight, p.partials.out[(s * all + row) * p.dim + channel], value);
    }
    tile[i][x] = __fdiv_rn(value, total);
    if (channel == 0) p.lse[row] = log_sum_exp(maximum, total);
  }
  __syncthreads();
  // Neighbouring threads write along the axis that is contiguous.
  S* out = static_cast<S*>(p.out.data) + index / p.heads * p.out.batch + index % p.heads * p.out.head;
  const bool by_token = p.out.channel != 1;
  for (int i = y; i < kTile; i += kCombineRows) {
    const int64_t query = first_query + (by_token ? x : i), to = first_channel + (by_token ? i : x);
    if (query < p.queries && to < p.dim) {
      encode(by_token ? tile[x][i] : tile[i][x], out[query * p.out.token + to * p.out.channel]);
    }
  }
}

template <class S>
int combine(const AttentionArgs& args, const Split& split, cudaStream_t stream) {
  const AttentionProblem& problem = args.problem;
  CombineParams p{attention_partials(args, split.count),
                  args.out,
                  static_cast<float*>(args.lse),
                  problem.batch,
                  problem.heads,
                  problem.queries,
                  problem.dim,
                  split.count};
  const int64_t heads = p.batch * p.heads;
  const int64_t blocks = (p.queries + kTile - 1) / kTile * ((p.dim + kTile - 1) / kTile);
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const unsigned z = slices(heads);
  Shape shape;
  shape.grid = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((heads + z - 1) / z), z);
  shape.threads = kTile * kCombineRows;
  return launch(attention_combine_kernel<S>, shape, stream, p);
}

template <class S>
int run(int (*family)(const AttentionArgs&, const Split&, cudaStream_t), const AttentionArgs& args,
        cudaStream_t stream) {
  const Split split = attention_split(args.problem);
  const int status = family(args, split, stream);
  return status != cudaSuccess || split.count == 1 ? status : combine<S>(args, split, stream);
}

}  // namespace

Split attention_split(const AttentionProblem& problem) {
  const int64_t rows = problem.dim <= 128 ? 128 : 64;  // of a block of the tensor-core kernels
  const int64_t tiles = problem.heads * ((problem.queries + rows - 1) / rows);
  int64_t count = tiles > 0 ? (kWantedBlocks + tiles / 2) / tiles : 1;
  if (count > problem.keys / kLeastKeys) count = problem.keys / kLeastKeys;
  if (count > kMostSplits) count = kMostSplits;
  if (count <= 1) return {1, problem.keys};
  const int64_t keys = round_up((problem.keys + count - 1) / count, kSplitStep);
  return {(problem.keys + keys - 1) / keys, keys};
}

Partials attention_partials(const AttentionArgs& args, int64_t splits) {
  if (splits == 1) return {nullptr, nullptr, nullptr};
  const AttentionProblem& p = args.problem;
  const int64_t rows = splits * p.batch * p.heads * p.queries;
  float* out = static_cast<float*>(args.workspace);
  return {out, out + rows * p.dim, out + rows * p.dim + rows};
}

int64_t attention_workspace(const AttentionProblem& problem) {
  const Split split = attention_split(problem);
  if (split.count == 1) return 0;
  const int64_t rows = split.count * problem.batch * problem.heads * problem.queries;
  return rows * (problem.dim + 2) * static_cast<int64_t>(sizeof(float));
}

const char* attention_limit(const AttentionProblem& problem, int capability) {
  if (problem.dtype == Dtype::bf16 && capability < 80) return "bfloat16 attention needs compute capability 8.0";
  if (problem.dtype == Dtype::f64) return "float64 attention runs on the CPU only";
  return nullptr;
}

int attention(const AttentionArgs& args, void* stream) {
  const AttentionProblem& problem = args.problem;
  if (problem.batch == 0 || problem.heads == 0 || problem.queries == 0) return cudaSuccess;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (problem.dtype) {
    case Dtype::f32:
      return run<float>(attention_ffma, args, on);
    case Dtype::f16:
      return run<Half>(attention_mma_f16, args, on);
    case Dtype::bf16:
      return run<Bfloat16>(attention_mma_bf16, args, on);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dk::cuda
