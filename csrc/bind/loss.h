// The op `loss`.
#pragma once

#include "../core/loss.h"
#include "memory.h"
#include "rows.h"

namespace dk::bind {

template <class Backend>
struct LossOps {
  static Table table() { return {"loss", {DK_LOSS_COLUMNS(DK_COLUMN_NAME)}}; }

  static void run(const LossArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::loss, args, Backend::grain(args.seeds.data != nullptr));
      cpu::loss_finish(args);
    } else {
      Backend::launch("loss", cuda::loss, args, where);
    }
  }

  static std::tuple<Tensor, MaybeTensor> loss(Tensor pred_tensor, Tensor x0_tensor, Tensor table_tensor,
                                              MaybeTensor index_tensor, MaybeTensor seeds_tensor, int64_t stream,
                                              MaybeTensor noise_tensor, int64_t reduction, bool want_grad,
                                              bool wide_grad) {
    const char* op = "loss";
    const Operand pred("pred", pred_tensor), x0("x0", x0_tensor), table("table", table_tensor),
        index("index", index_tensor), seeds("seeds", seeds_tensor), noise("noise", noise_tensor);
    check_batched(op, x0);
    Backend::check(op, x0);
    const Dtype dtype = float_dtype(op, x0), pred_dtype = float_dtype(op, pred);
    check_same_device(op, pred, x0);
    check_shape(op, pred, x0);
    check_same_device(op, noise, x0);
    check_shape(op, noise, x0);
    check_dtype(op, noise, x0);
    check_noise_source(op, seeds, noise);
    if (reduction < 0 || reduction > 2) fail(op, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);

    LossArgs args{};
    args.reduction = static_cast<Reduction>(reduction);
    args.rows = sample_rows<Backend>(op, table, index, x0, kLossColumns);
    args.seeds = check_seeds(op, seeds, x0, x0.sizes[0]);
    args.stream = check_stream(op, stream);
    const int64_t batch = x0.sizes[0];
    const int32_t sums = sum_dtype(dtype);
    MaybeTensor grad;
    const Dtype grad_dtype = wide_grad && size_of(pred_dtype) < size_of(Dtype::f32) ? Dtype::f32 : pred_dtype;
    if (want_grad) grad = empty_like(pred, torch_dtype(grad_dtype));
    const Operand grad_operand("grad", grad);
    Tensor value = args.reduction == Reduction::none ? new_empty(x0, {batch}, sums) : new_empty(x0, {}, sums);
    args.space =
        make_space(op, x0, {&x0, &pred, &noise, &grad_operand}, seeds.handle != nullptr, Backend::kMaxChannels);
    args.x0 = make_view(args.space, x0, dtype);
    args.pred = make_view(args.space, pred, pred_dtype);
    args.noise = make_view(args.space, noise, dtype);
    args.grad = make_view(args.space, grad_operand, grad_dtype);
    const int64_t blocks = sum_blocks(args.space.count);
    // What the kernels add up on the way; of a small call on the host it is not worth a tensor.
    constexpr int64_t kFew = 64;
    double few[kFew];
    MaybeTensor partials, samples;
    if (Backend::kHost && batch <= kFew && 0 <= blocks && blocks < kFew && batch * (blocks + 1) <= kFew) {
      args.partials = few;
      args.samples = few + batch * blocks;
    } else {
      partials = new_empty(x0, {batch, blocks}, sums);
      samples = new_empty(x0, {batch}, sums);
      args.partials = partials->mutable_data_ptr();
      args.samples = samples->mutable_data_ptr();
    }
    args.value = value.mutable_data_ptr();
    run(args, x0);  // an empty sample has loss NaN, as torch's mean of nothing
    return {value, grad};
  }

  static void define(StableLibrary& m) {
    m.def(
        "loss(Tensor pred, Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
        "int reduction, bool want_grad, bool wide_grad=False) -> (Tensor, Tensor?)");
  }

  static void implement(StableLibrary& m) { m.impl("loss", TORCH_BOX(&LossOps::loss)); }
};

}  // namespace dk::bind
