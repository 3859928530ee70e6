// sum_j weights[j] z(seed, streams[j]): a weighted sum of noise by address, drawn and added in registers. What
// csrc/bind hands to the kernels; terms travel by value.
//
//   out_i = fma(w_n, z_n, ... fma(w_1, z_1, fma(w_0, z_0, 0)))     one rounding a term, in order
//
// float32, with the weights rounded to it; float64 tensors: float32 normals widened, sums and weights in float64.
#pragma once

#include "args.h"

namespace dk {

constexpr int kMaxNoiseTerms = 64;

template <class T>
struct NoiseTerms {
  int32_t n;
  uint64_t stream[kMaxNoiseTerms];
  T weight[kMaxNoiseTerms];
};

struct NoiseSumArgs {
  Space space;
  View out;
  Seeds seeds;
  NoiseTerms<double> terms;
};

namespace cpu {
void noise_sum(const NoiseSumArgs& args, int64_t begin, int64_t end);
}
namespace cuda {
int noise_sum(const NoiseSumArgs& args, void* stream);
}

}  // namespace dk
