// softmax(scale Q K^T) V: what csrc/bind hands to the attention kernels of csrc/cpu and csrc/cuda. Plain data.
#pragma once

#include "dtype.h"

namespace dk {

constexpr int64_t kMaxHeadDim = 256;  // and every multiple of kHeadDimStep below it
constexpr int64_t kHeadDimStep = 8;
constexpr int64_t kLargeHeadDim = 512;  // the one larger head: the middle block of latent autoencoders

// The dtypes that the kernels are written for.
constexpr bool attention_serves(Dtype dtype) {
  return dtype == Dtype::f64 || dtype == Dtype::f32 || dtype == Dtype::f16 || dtype == Dtype::bf16;
}

// [batch, heads, tokens, channels]; strides in elements. The token or the channel stride is 1, whatever the others are
// (stride 0 of an expanded input included).
struct HeadsView {
  void* data;
  int64_t batch, head, token, channel;
};

// Sizes and inputs that forward and backward share.
struct AttentionProblem {
  Dtype dtype;  // of q, k, v, out and their gradients; logits, softmax and sums are float32 (float64 for float64)
  int64_t batch, heads, queries, keys, dim;  // keys >= 1
  double scale;                              // of the logits
  HeadsView q, k, v;                         // q: [.., queries, dim]; k, v: [.., keys, dim]
};

struct AttentionArgs {
  AttentionProblem problem;
  HeadsView out;    // as q
  void* lse;        // [batch, heads, queries], contiguous: ln sum_j exp(scale q.k_j)
  void* workspace;  // cuda::attention_workspace bytes, 256-byte aligned; may be null if that is 0
};

struct AttentionGradArgs {
  AttentionProblem problem;
  HeadsView out, grad_out;  // as q; any strides in grad_out
  const void* lse;
  HeadsView dq, dk, dv;  // as q, k, v
  void* workspace;       // attention_grad_workspace bytes, 256-byte aligned
  int capability;        // of the device, 10 major + minor; the CPU does not read it
};

// The forward pass is tasks that any threads run in any order; the backward pass is phases of such tasks, one phase
// after the other. Results do not depend on the threads, nor on the other samples of the batch.
namespace cpu {
int64_t attention_tasks(const AttentionProblem& problem);
void attention(const AttentionArgs& args, int64_t begin, int64_t end);
int64_t attention_grad_workspace(const AttentionProblem& problem);  // bytes
int64_t attention_grad_phases(const AttentionProblem& problem);
int64_t attention_grad_tasks(const AttentionProblem& problem, int64_t phase);
void attention_grad(const AttentionGradArgs& args, int64_t phase, int64_t begin, int64_t end);
const char* attention_kernel(Dtype dtype);  // which micro-kernel serves this dtype here, for `diffkern info`
// GFLOP/s of that micro-kernel alone on tiles in the L1 cache, one thread, the best of the given time; 0 for float64,
// which has none. What the speed of attention is measured against.
double attention_gemm_rate(Dtype dtype, double seconds);
}  // namespace cpu

// Launchers as in args.h. `capability`: 10 major + minor of the device, which csrc/bind finds. A limit is a sentence
// fragment that says what this device or build cannot do ("float16 backward needs ..."), nullptr when there is none.
namespace cuda {
const char* attention_limit(const AttentionProblem& problem, int capability);
int64_t attention_workspace(const AttentionProblem& problem);  // bytes
int attention(const AttentionArgs& args, void* stream);
const char* attention_grad_limit(const AttentionProblem& problem, int capability);
int64_t attention_grad_workspace(const AttentionProblem& problem);  // bytes
int attention_grad(const AttentionGradArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
