// The variational bound and its gradient; partial sums of blocks, then their ordered sum.
#include "../core/variational.h"

#include "blocks.h"
#include "levels.h"
#include "ordered_sum.h"

namespace dk::cpu {
namespace {

// Absent operands read zeros, outputs nobody wants are scratch.
template <class T>
struct VariationalSpan {
  const T *pred, *w, *x0, *z;
  T *grad, *grad_w, *squares, *nats;  // squares, nats: kBlock values of scratch
  VariationalCoefficients<T> k;
  int64_t n;
};

template <class T>
struct VariationalSums {
  T squares, nats;
};

template <bool decodes, class T>
DK_BODY void variational_loop(const VariationalSpan<T>& span) {
  const VariationalSpan<T> s = span;
#pragma GCC ivdep
  for (int64_t i = 0; i < s.n; ++i) {
    const auto element = variational_element<decodes>(s.k, s.pred[i], s.w[i], s.x0[i], s.z[i]);
    s.squares[i] = element.square;
    s.nats[i] = element.nats;
    s.grad[i] = element.by_pred;
    s.grad_w[i] = element.by_w;
  }
}

struct Bounds {
  template <class T>
  DK_BODY static VariationalSums<T> run(const VariationalSpan<T>& span) {
    span.k.decodes ? variational_loop<true>(span) : variational_loop<false>(span);
    for (int64_t i = span.n; i < kSumBlock; ++i) span.squares[i] = span.nats[i] = T(0);
    return {fold(span.squares, kSumBlock), fold(span.nats, kSumBlock)};
  }
};

template <class T>
VariationalCoefficients<T> coefficients(const VariationalArgs& args, int64_t sample) {
  const int64_t averaged = args.reduction == Reduction::mean ? args.space.batch : 1;
  const double* row = args.rows.table + row_number(args.rows, sample) * kBoundColumns;
  return variational_coefficients<T>(row, args.space.count, averaged);
}

template <class T>
void run(const VariationalArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  T pred[kBlock], w[kBlock], x0[kBlock], z[kNoiseRoom], grad[kBlock], grad_w[kBlock], squares[kBlock], nats[kBlock];
  const Space& space = args.space;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(space, i);
    VariationalSpan<T> s;
    s.k = coefficients<T>(args, block.sample);
    s.z = zeros;
    if (s.k.v != T(0)) {
      s.z = args.noise.data != nullptr ? load(space, args.noise, block, z)
                                       : draw_ahead(space, block, seed_of(args.seeds, block.sample), args.stream, z,
                                                    {&args.pred, &args.w, &args.x0, &args.grad, &args.grad_w});
    }
    s.pred = load(space, args.pred, block, pred);
    s.w = args.w.data != nullptr ? load(space, args.w, block, w) : zeros;
    s.x0 = load(space, args.x0, block, x0);
    s.grad = target(space, args.grad, block, grad);
    s.grad_w = target(space, args.grad_w, block, grad_w);
    s.squares = squares;
    s.nats = nats;
    s.n = block.n;
    const VariationalSums<T> sums = at_level<Bounds>(s);
    T* partial = static_cast<T*>(args.partials) + 2 * i;
    partial[0] = sums.squares;
    partial[1] = sums.nats;
    store(space, args.grad, block, s.grad, grad);
    store(space, args.grad_w, block, s.grad_w, grad_w);
  }
}

template <class T>
void finish(const VariationalArgs& args) {
  const Space& space = args.space;
  const int64_t blocks = count_blocks(space);
  T* samples = static_cast<T*>(args.reduction == Reduction::none ? args.value : args.samples);
  T* means = static_cast<T*>(args.means);
  for (int64_t b = 0; b < space.batch; ++b) {
    const VariationalCoefficients<T> k = coefficients<T>(args, b);
    const T* partials = static_cast<const T*>(args.partials) + 2 * b * blocks;
    const T squares = ordered_sum(partials, blocks, 2), nats = ordered_sum(partials + 1, blocks, 2);
    means[2 * b] = mul(k.squares, squares);
    means[2 * b + 1] = mul(k.bits, nats);
    samples[b] = weighted_bound(k, squares, nats);
  }
  if (args.reduction == Reduction::none) return;
  *static_cast<T*>(args.value) = reduce_batch(samples, space.batch, args.reduction);
}

}  // namespace

void variational(const VariationalArgs& args, int64_t begin, int64_t end) {
  args.x0.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

void variational_finish(const VariationalArgs& args) {
  args.x0.dtype == Dtype::f64 ? finish<double>(args) : finish<float>(args);
}

}  // namespace dk::cpu
