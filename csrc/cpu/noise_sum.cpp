// Weighted sums of noise by address.
#include "../core/noise_sum.h"

#include "blocks.h"

namespace dk::cpu {
namespace {

void span(const NoisingSpan<float>& s) { isa().noising_f32(s); }
void span(const NoisingSpan<double>& s) { isa().noising_f64(s); }

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
      // Noising of the sum so far: 1 sum + w z, where 1 sum is exact, so this is the one fma of the formula.
      span(NoisingSpan<T>{to, normals, to, nullptr, {T(1), static_cast<T>(args.terms.weight[j]), T(0), T(0)}, block.n});
    }
    store(args.space, args.out, block, to, sum);
  }
}

}  // namespace

void noise_sum(const NoiseSumArgs& args, int64_t begin, int64_t end) {
  args.out.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
