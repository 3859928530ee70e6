// The op `variational`.
#pragma once

#include "../core/variational.h"
#include "memory.h"
#include "rows.h"
#include "step_checks.h"

namespace dk::bind {

template <class Backend>
struct VariationalOps {
  static Table table() { return {"variational", {DK_BOUND_COLUMNS(DK_COLUMN_NAME)}}; }

  static void run(const VariationalArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::variational, args, Backend::kGrainWithNoise);
      cpu::variational_finish(args);
    } else {
      Backend::launch("variational", cuda::variational, args, where);
    }
  }

  // Does pred hold a variance beside the mean? Its shape says so.
  static bool is_learned(const char* op, const Operand& pred, const Operand& x0) {
    bool same = pred.dims == x0.dims && pred.dims > 0, doubled = same && x0.dims > 1;
    for (int64_t d = 0; same && d < x0.dims; ++d) {
      if (d != 1) same = pred.sizes[d] == x0.sizes[d];
    }
    doubled = doubled && same && pred.sizes[1] == 2 * x0.sizes[1];
    if (!same || !(doubled || x0.dims == 1 || pred.sizes[1] == x0.sizes[1])) {
      fail(op, "pred must have the shape of x0 ", shape_text(x0),
           " (fixed variance) or twice its channels (learned), got ", shape_text(pred));
    }
    return doubled;
  }

  static void check_row(const char* op, const double* row, int64_t number, bool learned) {
    if (!(row[kBoundClip] > 0)) {
      fail(op, "clip must be positive (inf: no clipping), got ", row[kBoundClip], " in row ", number);
    }
    if (!(row[kBoundInvStd] >= 0)) {
      fail(op, "inv_std must not be negative (0: no decoder), got ", row[kBoundInvStd], " in row ", number);
    }
    if (row[kBoundInvStd] > 0 && !(row[kBoundBin] > 0)) {
      fail(op, "bin must be positive where the decoder is at work, got ", row[kBoundBin], " in row ", number);
    }
    if (row[kBoundR1] != 0 && !learned) {
      fail(op, "pred must have twice the channels of x0: the row learns its variance with r1 = ", row[kBoundR1]);
    }
  }

  static std::tuple<Tensor, Tensor, MaybeTensor> variational(Tensor pred_tensor, Tensor x0_tensor, Tensor table_tensor,
                                                             MaybeTensor index_tensor, MaybeTensor seeds_tensor,
                                                             int64_t stream, MaybeTensor noise_tensor,
                                                             int64_t reduction, bool want_grad) {
    const char* op = "variational";
    const Operand whole("pred", pred_tensor), x0("x0", x0_tensor), table("table", table_tensor),
        index("index", index_tensor), seeds("seeds", seeds_tensor), noise("noise", noise_tensor);
    check_batched(op, x0);
    Backend::check(op, x0);
    const Dtype dtype = float_dtype(op, x0), pred_dtype = float_dtype(op, whole);
    check_same_device(op, whole, x0);
    const bool learned = is_learned(op, whole, x0);
    check_same_device(op, noise, x0);
    check_shape(op, noise, x0);
    check_dtype(op, noise, x0);
    check_noise_source(op, seeds, noise);
    if (reduction < 0 || reduction > 2) fail(op, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);

    VariationalArgs args{};
    const int64_t batch = x0.sizes[0], channels = x0.dims > 1 ? x0.sizes[1] : 1;
    args.reduction = static_cast<Reduction>(reduction);
    args.rows = sample_rows<Backend>(op, table, index, x0, kBoundColumns);
    check_rows<Backend>(args.rows, kBoundColumns, batch,
                        [&](const double* row, int64_t number) { check_row(op, row, number, learned); });
    args.seeds = check_seeds(op, seeds, x0, batch);
    args.stream = check_stream(op, stream);

    const int32_t sums = sum_dtype(dtype);
    MaybeTensor grad;
    if (want_grad) grad = empty_like(whole, whole.dtype);
    const Halves preds(op, whole, channels, learned), grads(op, {"grad", grad}, channels, learned);
    args.space = make_space(op, x0, {&x0, &preds.first, &preds.second, &noise, &grads.first, &grads.second},
                            seeds.handle != nullptr, Backend::kMaxChannels);
    args.x0 = make_view(args.space, x0, dtype);
    args.pred = make_view(args.space, preds.first, pred_dtype);
    args.w = make_view(args.space, preds.second, pred_dtype);
    args.noise = make_view(args.space, noise, dtype);
    args.grad = make_view(args.space, grads.first, pred_dtype);
    args.grad_w = make_view(args.space, grads.second, pred_dtype);

    const int64_t blocks = sum_blocks(args.space.count);
    Tensor value = args.reduction == Reduction::none ? new_empty(x0, {batch}, sums) : new_empty(x0, {}, sums);
    Tensor means = new_empty(x0, {batch, 2}, sums), samples = new_empty(x0, {batch}, sums);
    Tensor partials = new_empty(x0, {batch, blocks, 2}, sums);
    args.value = value.mutable_data_ptr();
    args.means = means.mutable_data_ptr();
    args.partials = partials.mutable_data_ptr();
    args.samples = samples.mutable_data_ptr();
    run(args, x0);
    return {value, means, grad};
  }

  static void define(StableLibrary& m) {
    m.def(
        "variational(Tensor pred, Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
        "int reduction, bool want_grad) -> (Tensor, Tensor, Tensor?)");
  }

  static void implement(StableLibrary& m) { m.impl("variational", TORCH_BOX(&VariationalOps::variational)); }
};

}  // namespace dk::bind
