// Weighted squared error and its gradient; partial sums of blocks, then their sum in a fixed order.
#include "../core/loss.h"

#include "blocks.h"
#include "levels.h"
#include "ordered_sum.h"

namespace dk::cpu {
namespace {

template <class T>
struct LossSpan {
  const T *pred, *x0, *z;
  T* grad;     // may be null
  T* squares;  // kBlock values of scratch
  LossCoefficients<T> k;
  int64_t n;
};

template <class T>
DK_BODY T loss_element(const LossSpan<T>& span, const LossCoefficients<T>& k, int64_t i) {
  const T difference = sub(span.pred[i], affine(k.u, span.x0[i], k.v, span.z[i]));
  if (span.grad != nullptr) span.grad[i] = mul(k.gradient, difference);
  return mul(difference, difference);
}

// The sum of the squares of a span, and its gradients.
struct Squares {
  template <class T>
  DK_BODY static T run(const LossSpan<T>& span) {
    const LossCoefficients<T> k = span.k;
    T* squares = span.squares;
    int64_t width = kSumBlock;
    if (span.n == kSumBlock) {  // the first two folds at once, without storing what they fold
      width = kSumBlock / 4;
      const LossSpan<T> s = span;
      if (s.grad != nullptr) {
#pragma GCC ivdep
        for (int64_t i = 0; i < width; ++i) {
          const T even = add(loss_element(s, k, i), loss_element(s, k, i + 2 * width));
          const T odd = add(loss_element(s, k, i + width), loss_element(s, k, i + 3 * width));
          squares[i] = add(even, odd);
        }
      } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < width; ++i) {
          const T even = add(loss_element(s, k, i), loss_element(s, k, i + 2 * width));
          const T odd = add(loss_element(s, k, i + width), loss_element(s, k, i + 3 * width));
          squares[i] = add(even, odd);
        }
      }
    } else {
      for (int64_t i = 0; i < span.n; ++i) squares[i] = loss_element(span, k, i);
      for (int64_t i = span.n; i < width; ++i) squares[i] = T(0);
    }
    return fold(squares, width);
  }
};

template <class T>
void run(const LossArgs& args, int64_t begin, int64_t end) {
  static const T zeros[kBlock] = {};
  T pred[kBlock], x0[kBlock], z[kNoiseRoom], grad[kBlock], squares[kBlock];
  const Space& space = args.space;
  const int64_t averaged = args.reduction == Reduction::mean ? space.batch : 1;
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_at(space, i);
    const double* row = args.rows.table + row_number(args.rows, block.sample) * kLossColumns;
    LossSpan<T> s;
    s.k = loss_coefficients<T>(row, space.count, averaged);
    s.z = zeros;
    if (s.k.v != T(0)) {
      s.z = args.noise.data != nullptr ? load(space, args.noise, block, z)
                                       : draw_ahead(space, block, seed_of(args.seeds, block.sample), args.stream, z,
                                                    {&args.pred, &args.x0, &args.grad});
    }
    s.pred = load(space, args.pred, block, pred);
    s.x0 = s.k.u != T(0) ? load(space, args.x0, block, x0) : zeros;
    s.grad = args.grad.data != nullptr ? target(space, args.grad, block, grad) : nullptr;
    s.squares = squares;
    s.n = block.n;
    static_cast<T*>(args.partials)[i] = at_level<Squares>(s);
    if (s.grad != nullptr) store(space, args.grad, block, s.grad, grad);
  }
}

template <class T>
void finish(const LossArgs& args) {
  const Space& space = args.space;
  const int64_t blocks = count_blocks(space), averaged = args.reduction == Reduction::mean ? space.batch : 1;
  T* samples = static_cast<T*>(args.reduction == Reduction::none ? args.value : args.samples);
  for (int64_t b = 0; b < space.batch; ++b) {
    const double* row = args.rows.table + row_number(args.rows, b) * kLossColumns;
    const T sum = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks);
    samples[b] = mul(loss_coefficients<T>(row, space.count, averaged).value, sum);
  }
  if (args.reduction == Reduction::none) return;
  *static_cast<T*>(args.value) = reduce_batch(samples, space.batch, args.reduction);
}

}  // namespace

void loss(const LossArgs& args, int64_t begin, int64_t end) {
  args.x0.dtype == Dtype::f64 ? run<double>(args, begin, end) : run<float>(args, begin, end);
}

void loss_finish(const LossArgs& args) { args.x0.dtype == Dtype::f64 ? finish<double>(args) : finish<float>(args); }

}  // namespace dk::cpu
