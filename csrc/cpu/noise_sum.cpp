// Weighted sums of noise by address.
#include "../core/noise_sum.h"

#include <algorithm>

#include "affine.h"
#include "blocks.h"

namespace dk::cpu {
namespace {

template <class T>
void run(const NoiseSumArgs& args, int64_t begin, int64_t end) {
  T z[kNoiseRoom], sum[kBlock];
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(args.space, i);
    const uint64_t seed = seed_of(args.seeds, block.sample);
    T* to = target(args.space, args.out, block, sum);
    std::fill_n(to, block.n, T(0));
    for (int j = 0; j < args.terms.n; ++j) {
      const T* normals = draw(args.space, block, seed, args.terms.stream[j], z);
      // 1 sum + w z, where 1 sum is exact: this is the one fma of the formula.
      at_level<Affine>(T(1), to, static_cast<T>(args.terms.weight[j]), normals, to, block.n);
    }
    store(args.space, args.out, block, to, sum);
  }
}

}  // namespace

void noise_sum(const NoiseSumArgs& args, int64_t begin, int64_t end) {
  args.out.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
