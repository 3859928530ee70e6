// The kernel families of the attention forward pass, and what they share with the kernel that combines a split over
// keys.
#pragma once

#include "../core/attention.h"
#define DK_SOFTMAX __device__ __forceinline__
#include "../core/softmax.h"
#include "launch.cuh"

namespace dk::cuda {

__device__ __forceinline__ float exp2_fast(float x) {  // 2 ulp; subnormal results are 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The arithmetic of core/softmax.h: logits times scale log2(e).
struct FastPowers : SoftmaxScalars {
  static __device__ __forceinline__ float max(float a, float b) { return fmaxf(a, b); }
  static __device__ __forceinline__ float sub(float a, float b) { return a - b; }
  static __device__ __forceinline__ float power(float x) { return exp2_fast(x); }
  static __device__ __forceinline__ float base(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }
};
struct ExactPowers : FastPowers {
  static __device__ __forceinline__ float power(float x) { return exp2f(x); }
};

// The log-sum-exp of a row from its maximum and sum, in one rounding more than the logarithm's.
__device__ __forceinline__ float log_sum_exp(float maximum, float sum) { return fma(maximum, kLn2, logf(sum)); }

// A head with few queries and many keys is cut into `splits` ranges of keys, each a task of its own. The workspace then
// holds, for split s, head h of all batch * heads (batch-major), query i:
//   out  float  [splits, batch * heads, queries, dim]  sum_j exp2(t_ij - m) v_j, not normalised
//   max  float  [splits, batch * heads, queries]       m: maximum over the range of t_ij = scale log2(e) q_i.k_j
//   sum  float  [splits, batch * heads, queries]       sum_j exp2(t_ij - m)
// where m = 0 stands in the exponents if the maximum is -inf (then `max` is -inf, `out` and `sum` are 0 or NaN).
struct Partials {
  float *out, *max, *sum;
};

// Keys that one range holds, a multiple of kSplitStep (the tiles of all kernels divide it); the last may hold fewer,
// none is empty. Depends on heads, queries, keys and dim only: neither batch nor device may change the results.
constexpr int64_t kSplitStep = 256;
struct Split {
  int64_t count, keys;
};
Split attention_split(const AttentionProblem& problem);
Partials attention_partials(const AttentionArgs& args, int64_t splits);  // null pointers if there is one range

// Each serves every dim, axis order and alignment; args.out and args.lse are written if split.count is 1, else the
// partials are.
int attention_ffma(const AttentionArgs& args, const Split& split, cudaStream_t stream);      // float32
int attention_mma_f16(const AttentionArgs& args, const Split& split, cudaStream_t stream);   // float16
int attention_mma_bf16(const AttentionArgs& args, const Split& split, cudaStream_t stream);  // bfloat16, from sm_80

}  // namespace dk::cuda
