// Weighted squared error and its gradient; partial sums of blocks, then their sum in a fixed order.
#include "../core/loss.h"

#include "blocks.h"
#include "ordered_sum.h"

namespace dk::cpu {
namespace {

float span(const LossSpan<float>& s) { return isa().loss_f32(s); }
double span(const LossSpan<double>& s) { return isa().loss_f64(s); }

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
    static_cast<T*>(args.partials)[i] = span(s);
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
