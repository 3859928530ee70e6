// The attention backward pass: what the devices can do, the sums that all kernels need, and the choice of kernels.
#include "attention_grad_launch.cuh"
#include "memory.cuh"

namespace dk::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- delta
// A block has kDeltaRows queries and kDeltaParts threads for each: thread `part` sums the chunks part, part +
// kDeltaParts, ... of the products, then the parts are added as a tree. The order of the sums is the same for all
// strides and alignments: those of a sample may depend on the rest of its batch.
constexpr int kDeltaRows = 32, kDeltaParts = 8, kDeltaChunk = 8;
static_assert(kHeadDimStep % kDeltaChunk == 0);

struct DeltaParams {
  HeadsView out, grad_out;
  bool out_chunks, grad_out_chunks;  // chunks in 16-byte accesses
  bool by_token;                     // neighbouring threads take neighbouring queries, else neighbouring channels
  int64_t heads, queries, dim, tiles, run;
  const float* lse;
  float* delta;      // [batch, heads, queries], or
  QueryTerms terms;  // these
};

template <class S>
__device__ __forceinline__ void load_products(const HeadsView& view, bool chunks, int64_t at, float (&v)[kDeltaChunk]) {
  if (chunks) {
    load_as<S>(view.data, at, kDeltaChunk, v);
  } else {
#pragma unroll
    for (int j = 0; j < kDeltaChunk; ++j) v[j] = decode(static_cast<const S*>(view.data)[at + j * view.channel]);
  }
}

template <class S>
__global__ void __launch_bounds__(kDeltaRows* kDeltaParts) delta_kernel(DeltaParams p) {
  const int thread = static_cast<int>(threadIdx.x);
  const int row = p.by_token ? thread % kDeltaRows : thread / kDeltaParts;
  const int part = p.by_token ? thread / kDeltaRows : thread % kDeltaParts;
  const int64_t query = static_cast<int64_t>(blockIdx.x) % p.tiles * kDeltaRows + row;
  const int64_t bh = static_cast<int64_t>(blockIdx.x) / p.tiles, b = bh / p.heads, h = bh % p.heads;

  float sum = 0.0f;
  if (query < p.queries) {
    const int64_t out = b * p.out.batch + h * p.out.head + query * p.out.token;
    const int64_t grad_out = b * p.grad_out.batch + h * p.grad_out.head + query * p.grad_out.token;
    for (int64_t channel = part * kDeltaChunk; channel < p.dim; channel += kDeltaParts * kDeltaChunk) {
      float u[kDeltaChunk], v[kDeltaChunk];
      load_products<S>(p.out, p.out_chunks, out + channel * p.out.channel, u);
      load_products<S>(p.grad_out, p.grad_out_chunks, grad_out + channel * p.grad_out.channel, v);
#pragma unroll
      for (int j = 0; j < kDeltaChunk; ++j) sum = __fmaf_rn(u[j], v[j], sum);
    }
  }
  if (p.by_token) {
    __shared__ float parts[kDeltaParts][kDeltaRows];
    parts[part][row] = sum;
#pragma unroll
    for (int half = kDeltaParts / 2; half > 0; half /= 2) {
      __syncthreads();
      if (part < half) parts[part][row] = sum = sum + parts[part + half][row];
    }
  } else {
#pragma unroll
    for (int half = kDeltaParts / 2; half > 0; half /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, half);
  }
  if (part != 0) return;
  if (p.delta != nullptr) {
    if (query < p.queries) p.delta[bh * p.queries + query] = sum;
  } else if (query < p.run) {
    const float log2_sum = query < p.queries ? __fmul_rn(p.lse[bh * p.queries + query], static_cast<float>(kLog2E)) : 0;
    p.terms.log2_sum[bh * p.run + query] = log2_sum;
    p.terms.minus_delta[bh * p.run + query] = -sum;
  }
}

bool has_chunks(const HeadsView& v, const AttentionProblem& problem) {
  const int64_t unit = 16 / size_of(problem.dtype);
  return v.channel == 1 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.token % unit == 0 &&
         (problem.batch <= 1 || v.batch % unit == 0) && (problem.heads <= 1 || v.head % unit == 0);
}

template <class S>
int launch_delta(const AttentionGradArgs& args, float* delta, const QueryTerms& terms, cudaStream_t stream) {
  const AttentionProblem& problem = args.problem;
  DeltaParams p{};
  p.out = args.out, p.grad_out = args.grad_out;
  p.out_chunks = has_chunks(args.out, problem), p.grad_out_chunks = has_chunks(args.grad_out, problem);
  p.by_token = args.out.channel != 1 || (args.grad_out.channel != 1 && args.out.token == 1);
  p.heads = problem.heads, p.queries = problem.queries, p.dim = problem.dim;
  p.run = query_run(problem.queries);
  p.tiles = ((delta ? p.queries : p.run) + kDeltaRows - 1) / kDeltaRows;
  p.lse = static_cast<const float*>(args.lse);
  p.delta = delta, p.terms = terms;
  const int64_t blocks = p.tiles * problem.batch * problem.heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const Shape shape{dim3(static_cast<unsigned>(blocks)), kDeltaRows * kDeltaParts};
  return launch(delta_kernel<S>, shape, stream, p);
}

}  // namespace

// ------------------------------------------------------------------------------------------------------ dispatch
const char* attention_grad_limit(const AttentionProblem& problem, int capability) {
  if (problem.dtype == Dtype::f64) return "float64 attention is computed on the CPU only";
  if (capability < 75) return "attention needs a GPU of compute capability 7.5 or newer";
  if (capability < 80) {
    if (problem.dtype == Dtype::f32) {
      return problem.dim <= kMaxHeadDim
                 ? nullptr
                 : "the backward pass with a head dim of 512 needs a GPU of compute capability 8.0 or newer";
    }
    if (problem.dtype == Dtype::bf16)
      return "the backward pass in bfloat16 needs a GPU of compute capability 8.0 or newer";
    if (problem.dim > 128) {
      return "the backward pass in float16 with a head dim above 128 needs a GPU of compute capability 8.0 or newer";
    }
  }
  return nullptr;
}

int64_t attention_grad_workspace(const AttentionProblem& problem) {
  const int64_t heads = problem.batch * problem.heads;
  if (problem.dtype == Dtype::f32) return heads * problem.queries * static_cast<int64_t>(sizeof(float));
  return 2 * heads * query_run(problem.queries) * static_cast<int64_t>(sizeof(float));
}

int attention_grad(const AttentionGradArgs& args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const auto delta = static_cast<float*>(args.workspace);
  const AttentionProblem& problem = args.problem;
  const QueryTerms terms = {delta, delta + problem.batch * problem.heads * query_run(problem.queries)};
  int status = cudaErrorNotSupported;
  switch (problem.dtype) {
    case Dtype::f32:
      status = launch_delta<float>(args, delta, {}, stream);
      return status != cudaSuccess ? status : attention_grad_ffma(args, delta, stream);
    case Dtype::f16:
      status = launch_delta<Half>(args, nullptr, terms, stream);
      return status != cudaSuccess ? status : attention_grad_mma_f16(args, terms, stream);
    case Dtype::bf16:
      status = launch_delta<Bfloat16>(args, nullptr, terms, stream);
      return status != cudaSuccess ? status : attention_grad_mma_bf16(args, terms, stream);
    default:
      return status;
  }
}

}  // namespace dk::cuda
