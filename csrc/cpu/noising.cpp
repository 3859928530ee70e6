// Forward noising: x_t, and the target and eps where they are asked for, in one pass.
#include "../core/noising.h"

#include <cstring>

#include "affine.h"
#include "blocks.h"

namespace dk::cpu {
namespace {

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
    const T* clean = load(space, args.x0, block, x0);
    // The target first: x_t may be written over x0.
    if (goal != nullptr) at_level<Affine>(k.u, clean, k.v, eps, goal, block.n);
    at_level<Affine>(k.s, clean, k.n, eps, x_t, block.n);
    store(space, args.out, block, x_t, out);
    if (goal != nullptr) store(space, args.target, block, goal, target_buffer);
  }
}

}  // namespace

void noising(const NoisingArgs& args, int64_t begin, int64_t end) {
  args.x0.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
