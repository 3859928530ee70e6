// The universal sampler step.
#include "../core/step.h"

#include <algorithm>

#include "blocks.h"

namespace dk::cpu {
namespace {

void span(const StepSpan<float>& s) { isa().step_f32(s); }
void span(const StepSpan<double>& s) { isa().step_f64(s); }

template <class T>
struct Buffers {
  T x[kBlock], u[kBlock], c[kBlock], h[kHistories][kBlock], mask[kBlock], known[kBlock];
  T z[kNoiseRoom], z2[kNoiseRoom];
  T out[kBlock], x0[kBlock], s[kBlock], next[kBlock], guided[kBlock];
};

template <class T>
void run(const StepArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  Buffers<T> buffers;
  const Space& space = args.space;
  uint32_t want = 0;
  if (args.x0.data != nullptr) want |= kWantX0;
  if (args.s.data != nullptr) want |= kWantS;
  if (args.next.data != nullptr) want |= kWantNext;
  if (args.mask.data != nullptr) want |= kTermMask;

  bool all_direct = true;
  for (const View* view : {&args.x, &args.u, &args.out, &args.x0, &args.s}) {
    all_direct = all_direct && (view->data == nullptr || is_direct<T>(space, *view));
  }

  StepSpan<T> s;
  const double* row = nullptr;
  int64_t sample = -1;
  for (int64_t i = begin; i < end; ++i) {
    Block block = block_at(space, i);
    if (block.sample != sample) {
      sample = block.sample;
      row = args.rows.table != nullptr ? args.rows.table + row_number(args.rows, sample) * kColumns : args.row;
      s.k = step_coefficients<T>(row);
      s.terms = step_terms(row, want);
    }
    const uint32_t terms = s.terms;
    if (is_one_loop(terms) && all_direct) {  // no buffers: the rest of the sample is one span
      const int64_t blocks = std::min(count_blocks(space) - block.begin / kBlock, end - i);
      block.n = std::min(blocks * kBlock, space.count - block.begin);
      i += blocks - 1;
    }
    const auto input = [&](uint32_t readers, const View& view, T* buffer) {
      return (terms & readers) ? load(space, view, block, buffer) : zeros;
    };
    s.x = input(kTermP | kTermA | kTermSlopeA, args.x, buffers.x);
    s.u = input(kTermQ | kTermD | kTermSlopeD, args.u, buffers.u);
    s.c = input(kTermW, args.c, buffers.c);
    for (int k = 0; k < kHistories; ++k) s.h[k] = input(kTermE0 << k, args.h[k], buffers.h[k]);
    s.mask = input(kTermMask, args.mask, buffers.mask);
    s.known = input(kTermKnownS, args.known, buffers.known);
    s.z = zeros;
    if (terms & kReadsNoise) {
      s.z = args.noise.data != nullptr
                ? load(space, args.noise, block, buffers.z)
                : draw_ahead(space, block, seed_of(args.seeds, sample), static_cast<uint64_t>(row[kStream]), buffers.z,
                             {&args.x, &args.u, &args.out});
    }
    s.z2 = zeros;
    if (terms & kTermKnownN) {
      s.z2 = draw(space, block, seed_of(args.seeds, sample), static_cast<uint64_t>(row[kKnownStream]), buffers.z2);
    }
    const std::initializer_list<const T*> later{s.h[0], s.h[1], s.h[2], s.h[3], s.z, s.mask, s.known};
    s.out = target(space, args.out, block, buffers.out, later);
    s.x0 = target(space, args.x0, block, buffers.x0, later);
    s.s = target(space, args.s, block, buffers.s, later);
    s.next = target(space, args.next, block, buffers.next, later);
    s.guided = buffers.guided;
    s.n = block.n;
    span(s);
    store(space, args.out, block, s.out, buffers.out);
    store(space, args.x0, block, s.x0, buffers.x0);
    store(space, args.s, block, s.s, buffers.s);
    store(space, args.next, block, s.next, buffers.next);
    if (args.next2.data != nullptr) scatter(space, args.next2, block, s.next);
  }
}

}  // namespace

void step(const StepArgs& args, int64_t begin, int64_t end) {
  args.state == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
