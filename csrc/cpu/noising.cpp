// Forward noising: x_t, and the target and eps where they are asked for, in one pass.
#include "../core/noising.h"

#include <cstring>

#include "blocks.h"

namespace dk::cpu {
namespace {

void span(const NoisingSpan<float>& s) { isa().noising_f32(s); }
void span(const NoisingSpan<double>& s) { isa().noising_f64(s); }

template <class T>
void run(const NoisingArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  T x0[kBlock], z[kNoiseRoom], out[kBlock], target_buffer[kBlock];
  const Space& space = args.space;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(space, i);
    const int64_t row = row_number(args.rows, block.sample);
    const NoisingCoefficients<T> k = noising_coefficients<T>(args.rows.table + row * kNoisingColumns);
    const T* eps = zeros;
    if (k.n != T(0) || (k.v != T(0) && args.target.data != nullptr) || args.eps.data != nullptr) {
      eps = args.noise.data != nullptr ? load(space, args.noise, block, z)
                                       : draw_ahead(space, block, seed_of(args.seeds, block.sample), args.stream, z,
                                                    {&args.x0, &args.out, &args.target});
    }
    if (args.eps.data != nullptr) {
      T* to = target(space, args.eps, block, out);
      std::memcpy(to, eps, static_cast<size_t>(block.n) * sizeof(T));
      store(space, args.eps, block, to, out);
    }
    T* x_t = target(space, args.out, block, out);
    T* goal = args.target.data != nullptr ? target(space, args.target, block, target_buffer) : nullptr;
    span(NoisingSpan<T>{load(space, args.x0, block, x0), eps, x_t, goal, k, block.n});
    store(space, args.out, block, x_t, out);
    if (goal != nullptr) store(space, args.target, block, goal, target_buffer);
  }
}

}  // namespace

void noising(const NoisingArgs& args, int64_t begin, int64_t end) {
  args.x0.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
