// The forward kernels on tensor cores of one dtype: which kernel serves a problem, and its launch.
#pragma once

#include "attention_mma_narrow.cuh"
#include "attention_mma_wide.cuh"

namespace dk::cuda {

template <class S, int kDim>
int attention_narrow(ForwardParams& p, cudaStream_t stream) {
  using C = Narrow<kDim>;
  return p.k.channel_major
             ? launch_forward(attention_narrow_kernel<S, kDim, true>, p, C::kRows, C::kThreads, C::kShared, stream)
             : launch_forward(attention_narrow_kernel<S, kDim, false>, p, C::kRows, C::kThreads, C::kShared, stream);
}

template <class S, int kDim>
int attention_wide(ForwardParams& p, cudaStream_t stream) {
  void (*const kernel)(ForwardParams) =
      p.k.channel_major ? attention_wide_kernel<S, kDim, true> : attention_wide_kernel<S, kDim, false>;
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (status != cudaSuccess) {
    cudaGetLastError();
    return status;
  }
  const int threads = attributes.maxThreadsPerBlock, rows = threads / Wide::kGroupThreads * Wide::kGroupRows;
  const int panels = (p.padded + Wide::kPanel - 1) / Wide::kPanel;
  return launch_forward(kernel, p, rows, threads, Wide::shared(rows, panels), stream);
}

template <class S>
int attention_mma(const AttentionArgs& args, const Split& split, cudaStream_t stream) {
  const AttentionProblem& problem = args.problem;
  if (problem.batch * problem.heads > int64_t{65535} * 65535) return cudaErrorInvalidConfiguration;
  ForwardParams p{};
  const bool by_channel = is_channel_major(problem.k);  // v too, if its tiles can be copied in chunks
  p.q = make_heads(problem.q, problem, problem.queries, is_channel_major(problem.q));
  p.k = make_heads(problem.k, problem, problem.keys, by_channel);
  p.v = make_heads(problem.v, problem, problem.keys, by_channel);
  p.out = make_heads(args.out, problem, problem.queries, is_channel_major(args.out));
  p.lse = static_cast<float*>(args.lse);
  p.partials = attention_partials(args, split.count);
  p.all_heads = static_cast<uint32_t>(problem.batch * problem.heads);
  p.heads = static_cast<uint32_t>(problem.heads);
  p.queries = problem.queries;
  p.keys = problem.keys;
  p.splits = static_cast<uint32_t>(split.count);
  p.split_keys = split.keys;
  p.dim = static_cast<int>(problem.dim);
  p.padded = (p.dim + 15) / 16 * 16;
  p.scale = static_cast<float>(problem.scale * kLog2E);
  p.scaled = p.scale > 0;
  if (p.padded <= 32) return attention_narrow<S, 32>(p, stream);
  if (p.padded <= 64) return attention_narrow<S, 64>(p, stream);
  if (p.padded <= 96) return attention_narrow<S, 96>(p, stream);
  if (p.padded <= 128) return attention_narrow<S, 128>(p, stream);
  if (p.padded <= 256) return attention_wide<S, 256>(p, stream);
  return attention_wide<S, 512>(p, stream);
}

}  // namespace dk::cuda
