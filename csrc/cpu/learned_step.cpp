// The sampler step with a learned variance: the noise of a block is scaled in the cache, then the step's own span runs.
#include "../core/learned_step.h"

#include "blocks.h"
#include "levels.h"
#include "step_span.h"

namespace dk::cpu {
namespace {

// z scaled to the learned standard deviation of every element; out may be z.
struct ScaledNoise {
  template <class T>
  DK_BODY static void run(const LearnedDeviation<T>& deviation, const T* v, const T* z, T* out, int64_t n) {
    const LearnedDeviation<T> k = deviation;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = learned_noise(k, v[i], z[i]);
  }
};

template <class T>
struct Buffers {
  T x[kBlock], m[kBlock], v[kBlock], mask[kBlock], known[kBlock];
  T z[kNoiseRoom], z2[kNoiseRoom];
  T out[kBlock], x0[kBlock], s[kBlock], next[kBlock], guided[kBlock];
};

template <class T>
void run(const LearnedStepArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  Buffers<T> buffers;
  const Space& space = args.space;
  uint32_t want = 0;
  if (args.x0.data != nullptr) want |= kWantX0;
  if (args.next.data != nullptr) want |= kWantNext;
  if (args.mask.data != nullptr) want |= kTermMask;

  StepSpan<T> s;
  LearnedDeviation<T> deviation{};
  const double* row = nullptr;
  int64_t sample = -1;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(space, i);
    if (block.sample != sample) {
      sample = block.sample;
      row = args.rows.table != nullptr ? args.rows.table + row_number(args.rows, sample) * kLearnedColumns : args.row;
      s.k = step_coefficients<T>(row);
      s.terms = learned_step_terms(row, want);
      deviation = learned_deviation<T>(row);
    }
    const uint32_t terms = s.terms;
    const auto input = [&](uint32_t readers, const View& view, T* buffer) {
      return (terms & readers) ? load(space, view, block, buffer) : zeros;
    };
    s.z = zeros;
    if (terms & kTermG) {
      const T* z = args.noise.data != nullptr
                       ? load(space, args.noise, block, buffers.z)
                       : draw_ahead(space, block, seed_of(args.seeds, sample), static_cast<uint64_t>(row[kStream]),
                                    buffers.z, {&args.x, &args.m, &args.v, &args.out});
      at_level<ScaledNoise>(deviation, input(kTermV, args.v, buffers.v), z, buffers.z, block.n);
      s.z = buffers.z;
    }
    s.x = input(kTermP | kTermA, args.x, buffers.x);
    s.u = input(kTermQ | kTermD, args.m, buffers.m);
    s.c = zeros;
    for (const T*& history : s.h) history = zeros;
    s.mask = input(kTermMask, args.mask, buffers.mask);
    s.known = input(kTermKnownS, args.known, buffers.known);
    s.z2 = zeros;
    if (terms & kTermKnownN) {
      s.z2 = draw(space, block, seed_of(args.seeds, sample), static_cast<uint64_t>(row[kKnownStream]), buffers.z2);
    }
    const std::initializer_list<const T*> later{s.mask, s.known};
    s.out = target(space, args.out, block, buffers.out, later);
    s.x0 = target(space, args.x0, block, buffers.x0, later);
    s.next = target(space, args.next, block, buffers.next, later);
    s.s = buffers.s;
    s.guided = buffers.guided;
    s.n = block.n;
    step_span(s);
    store(space, args.out, block, s.out, buffers.out);
    store(space, args.x0, block, s.x0, buffers.x0);
    store(space, args.next, block, s.next, buffers.next);
    if (args.next2.data != nullptr) scatter(space, args.next2, block, s.next);
  }
}

}  // namespace

void learned_step(const LearnedStepArgs& args, int64_t begin, int64_t end) {
  args.state == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
