// The log-density of a sampler step and its gradient; partial sums of blocks, then their ordered sum.
#include "../core/step_logprob.h"

#include "blocks.h"
#include "levels.h"
#include "ordered_sum.h"
#include "step_span.h"

namespace dk::cpu {
namespace {

// Absent operands read zeros, gradients nobody wants are scratch.
template <class T>
struct LogprobSpan {
  StepSpan<T> mean;  // gives the mean in `out`, and x0
  const T *after, *v, *x0;
  T *grad_u, *grad_c, *grad_v, *energies;  // energies: kBlock values of scratch
  LogprobRow<T> row;
  bool learned, wants, splits;  // wants: gradients; splits: those of u and c apart
};

template <bool learned, bool wants, class T>
DK_BODY void logprob_loop(const LogprobSpan<T>& span) {
  const LogprobSpan<T> s = span;
  const T* mean = s.mean.out;
#pragma GCC ivdep
  for (int64_t i = 0; i < s.mean.n; ++i) {
    const auto element = logprob_element<learned>(s.row, s.after[i], mean[i], s.x0[i], s.v[i]);
    s.energies[i] = element.energy;
    if (wants) s.grad_u[i] = element.by_m;
    if (wants && learned) s.grad_v[i] = element.by_v;
  }
}

// The energies of a span whose mean is there, their sum, and the gradients.
struct Energies {
  template <class T>
  DK_BODY static T run(const LogprobSpan<T>& span) {
    if (span.learned) {
      span.wants ? logprob_loop<true, true>(span) : logprob_loop<true, false>(span);
    } else {
      span.wants ? logprob_loop<false, true>(span) : logprob_loop<false, false>(span);
    }
    const int64_t n = span.mean.n;
    if (span.wants && span.splits) {
      const LogprobRow<T> row = span.row;
      T *grad_u = span.grad_u, *grad_c = span.grad_c;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const GuidedGradient<T> parts = guided_gradient(row, grad_u[i]);
        grad_u[i] = parts.u;
        grad_c[i] = parts.c;
      }
    }
    for (int64_t i = n; i < kSumBlock; ++i) span.energies[i] = T(0);
    return fold(span.energies, kSumBlock);
  }
};

template <class T>
struct Buffers {
  T after[kBlock], x[kBlock], u[kBlock], c[kBlock], v[kBlock], h[kHistories][kBlock];
  T mean[kBlock], x0[kBlock], s[kBlock], guided[kBlock], energies[kBlock];
  T grad_u[kBlock], grad_c[kBlock], grad_v[kBlock];
};

template <class T>
LogprobRow<T> row_of(const StepLogprobArgs& args, int64_t sample) {
  const double* row = args.row;
  if (args.rows.table != nullptr) row = args.rows.table + row_number(args.rows, sample) * logprob_columns(args.learned);
  LogprobRow<T> k;
  logprob_row(row, args.learned, args.space.count, k);
  return k;
}

template <class T>
void run(const StepLogprobArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  Buffers<T> buffers;
  const Space& space = args.space;
  const bool wants = args.grad_u.data != nullptr;
  LogprobSpan<T> s{};
  StepSpan<T>& mean = s.mean;
  s.learned = args.learned;
  s.energies = buffers.energies;
  mean.z = mean.mask = mean.known = mean.z2 = zeros;
  mean.out = buffers.mean;
  mean.x0 = buffers.x0;
  mean.s = mean.next = buffers.s;
  mean.guided = buffers.guided;
  int64_t sample = -1;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(space, i);
    if (block.sample != sample) {
      sample = block.sample;
      s.row = row_of<T>(args, sample);
      mean.k = s.row.step;
      mean.terms = s.row.terms;
      if (wants && (s.row.terms & kTermB) && (s.row.terms & kTermClip)) mean.terms |= kWantX0;
      s.x0 = (mean.terms & kWantX0) ? buffers.x0 : zeros;
    }
    s.grad_u = target(space, args.grad_u, block, buffers.grad_u);
    s.grad_c = target(space, args.grad_c, block, buffers.grad_c);
    s.grad_v = target(space, args.grad_v, block, buffers.grad_v);
    T* partial = static_cast<T*>(args.partials) + i;
    if (s.row.random) {
      const auto input = [&](bool reads, const View& view, T* buffer) {
        return reads ? load(space, view, block, buffer) : zeros;
      };
      const uint32_t terms = mean.terms;
      s.after = load(space, args.after, block, buffers.after);
      s.v = input(args.learned && s.row.r1 != T(0), args.v, buffers.v);
      mean.x = input(terms & (kTermP | kTermA), args.x, buffers.x);
      mean.u = input(terms & (kTermQ | kTermD), args.u, buffers.u);
      mean.c = input(terms & kTermW, args.c, buffers.c);
      for (int k = 0; k < kHistories; ++k) mean.h[k] = input(terms & (kTermE0 << k), args.h[k], buffers.h[k]);
      s.wants = wants;
      s.splits = args.grad_c.data != nullptr;
      mean.n = block.n;
      step_span(mean);
      *partial = at_level<Energies>(s);
    } else {
      *partial = T(0);
      for (T* grad : {s.grad_u, s.grad_c, s.grad_v}) std::fill(grad, grad + block.n, T(0));
    }
    store(space, args.grad_u, block, s.grad_u, buffers.grad_u);
    store(space, args.grad_c, block, s.grad_c, buffers.grad_c);
    store(space, args.grad_v, block, s.grad_v, buffers.grad_v);
  }
}

template <class T>
void finish(const StepLogprobArgs& args) {
  const int64_t blocks = count_blocks(args.space);
  for (int64_t b = 0; b < args.space.batch; ++b) {
    const T sum = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks);
    static_cast<T*>(args.value)[b] = logprob_value(row_of<T>(args, b), sum);
  }
}

}  // namespace

void step_logprob(const StepLogprobArgs& args, int64_t begin, int64_t end) {
  args.state == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

void step_logprob_finish(const StepLogprobArgs& args) {
  args.state == Dtype::f64 ? finish<double>(args) : finish<float>(args);
}

}  // namespace dk::cpu
