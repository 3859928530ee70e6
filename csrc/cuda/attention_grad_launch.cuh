// The kernel families of the attention backward pass, and what their dispatch prepares for them.
//
// With P = exp(scale q k^T - lse), delta_i = sum_d grad_out_id out_id, dS = P (grad_out v^T - delta):
//   dv = P^T grad_out,  dk = scale dS^T q,  dq = scale dS k
#pragma once

#include "attention_launch.cuh"

namespace dk::cuda {

// With one key the softmax is constant, and its gradient 0: rounding has no say in it (and NaN stays NaN).
inline double attention_grad_scale(const AttentionProblem& problem) { return problem.keys == 1 ? 0.0 : problem.scale; }

// What the kernels of float16 and bfloat16 need of each query: [batch, heads, query_run(queries)], 16-byte aligned. The
// run of a head is a whole number of tiles; what is past the queries is 0.
struct QueryTerms {
  float *log2_sum, *minus_delta;  // lse log2(e), -delta
};
constexpr int64_t kQueryRun = 64;
inline int64_t query_run(int64_t queries) { return (queries + kQueryRun - 1) / kQueryRun * kQueryRun; }

// Each serves every axis order and alignment.
// delta: [batch, heads, queries].
int attention_grad_ffma(const AttentionGradArgs& args, const float* delta, cudaStream_t stream);  // float32
int attention_grad_mma_f16(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream);
int attention_grad_mma_bf16(const AttentionGradArgs& args, const QueryTerms& terms, cudaStream_t stream);

}  // namespace dk::cuda
