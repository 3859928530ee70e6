// The kernel families of the attention forward pass, and what they share with the kernel that combines a split over
// keys.
#pragma once

#include "../core/attention.h"
#include "launch.cuh"

namespace dk::cuda {

constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.69314718055994531f;

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
