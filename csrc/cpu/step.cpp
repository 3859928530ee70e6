// The universal sampler step.
#include "../core/step.h"

#include <algorithm>

#include "blocks.h"
#include "levels.h"
#include "step_span.h"

namespace dk::cpu {
namespace {

// The base of the step for one set of terms. With a constant `terms` the compiler drops what is not at work; without
// (kAll), every operand is loaded and every output stored, so that the tests become selects and the loop vectorises.
template <bool kAll, class T>
DK_BODY void base_loop(const StepSpan<T>& span, const T* m, const uint32_t terms) {
  const StepCoefficients<T> k = span.k;
  const T *x = span.x, *z = span.z;
  T *out = span.out, *x0 = span.x0, *s = span.s;
#pragma GCC ivdep
  for (int64_t i = 0; i < span.n; ++i) {
    const T x_i = kAll || (terms & (kTermP | kTermA | kTermSlopeA)) ? x[i] : T(0);
    const T m_i = kAll || (terms & (kTermQ | kTermD | kTermSlopeD)) ? m[i] : T(0);
    const T z_i = kAll || (terms & kTermR) ? z[i] : T(0);
    const StepBase<T> base = step_base(k, terms, x_i, m_i, z_i);
    out[i] = base.x;
    if (kAll || (terms & kWantX0)) x0[i] = base.x0;
    if (kAll || (terms & kWantS)) s[i] = base.s;
  }
}

// Every loop gives the same bits: it is the same formula.
template <class T>
DK_BODY void base_body(const StepSpan<T>& span, const T* m, uint32_t terms) {
  switch (terms) {
#define DK_CASE(TERMS) \
  case TERMS:          \
    return base_loop<false>(span, m, TERMS);
    DK_FOR_BASE_LOOPS(DK_CASE)
#undef DK_CASE
    default:
      return base_loop<true>(span, m, terms);
  }
}

// out += c[0] term[0] + ... + c[kTerms - 1] term[kTerms - 1], a rounding each, in one pass over out.
template <int kTerms, class T>
DK_BODY void add_terms(const T* c, const T* const* term, T* out, int64_t n) {
  T by[kTerms];
  const T* in[kTerms];
  for (int j = 0; j < kTerms; ++j) by[j] = c[j], in[j] = term[j];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = out[i];
    for (int j = 0; j < kTerms; ++j) sum = fma(by[j], in[j][i], sum);
    out[i] = sum;
  }
}

// The histories and the noise that are at work, in the order of step_element.
template <class T>
DK_BODY void add_later_terms(const StepSpan<T>& span) {
  T c[kHistories + 1];
  const T* term[kHistories + 1];
  int count = 0;
  for (int j = 0; j < kHistories; ++j) {
    if (span.terms & (kTermE0 << j)) c[count] = span.k.e[j], term[count++] = span.h[j];
  }
  if (span.terms & kTermG) c[count] = span.k.g, term[count++] = span.z;
  switch (count) {
    case 1:
      return add_terms<1>(c, term, span.out, span.n);
    case 2:
      return add_terms<2>(c, term, span.out, span.n);
    case 3:
      return add_terms<3>(c, term, span.out, span.n);
    case 4:
      return add_terms<4>(c, term, span.out, span.n);
    case 5:
      return add_terms<5>(c, term, span.out, span.n);
    default:
      return;
  }
}

// The stages of the step one after the other over a span that stays in the L1 cache.
struct Stages {
  template <class T>
  DK_BODY static void run(const StepSpan<T>& span) {
    const uint32_t terms = span.terms;
    const StepCoefficients<T> k = span.k;
    const int64_t n = span.n;
    T* out = span.out;
    const T* m = span.u;
    if (terms & kTermW) {
      T* to = span.guided;
      const T *u = span.u, *c = span.c;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) to[i] = guided(k.w, u[i], c[i]);
      m = to;
    }
    base_body(span, m, terms & kBaseTerms);
    add_later_terms(span);
    if (terms & kTermMask) {
      const T *mask = span.mask, *known = span.known, *z2 = span.z2;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = step_masked(k, terms, out[i], mask[i], known[i], z2[i]);
    }
    if (terms & kWantNext) {
      T* next = span.next;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) next[i] = mul(k.next, out[i]);
    }
  }
};

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
    step_span(s);
    store(space, args.out, block, s.out, buffers.out);
    store(space, args.x0, block, s.x0, buffers.x0);
    store(space, args.s, block, s.s, buffers.s);
    store(space, args.next, block, s.next, buffers.next);
    if (args.next2.data != nullptr) scatter(space, args.next2, block, s.next);
  }
}

}  // namespace

void step_span(const StepSpan<float>& span) { at_level<Stages>(span); }
void step_span(const StepSpan<double>& span) { at_level<Stages>(span); }

void step(const StepArgs& args, int64_t begin, int64_t end) {
  args.state == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

}  // namespace dk::cpu
