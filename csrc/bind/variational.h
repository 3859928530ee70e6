// The op `variational` over a backend, which gives
//   static void variational(const VariationalArgs&, const Operand& where)
#pragma once

#include "../core/variational.h"
#include "ops.h"

namespace dk::bind {

template <class Backend>
struct VariationalOps {
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
    using Common = Ops<Backend>;
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
    Common::check_noise_source(op, seeds, noise);
    if (reduction < 0 || reduction > 2) fail(op, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);

    VariationalArgs args{};
    const int64_t batch = x0.sizes[0], channels = x0.dims > 1 ? x0.sizes[1] : 1;
    args.reduction = static_cast<Reduction>(reduction);
    args.rows = Common::table_rows(op, table, index, x0, kBoundColumns);
    if (Backend::kHost) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t r = row_number(args.rows, b);
        check_row(op, args.rows.table + r * kBoundColumns, r, learned);
      }
    }
    args.seeds = check_seeds(op, seeds, x0, batch);
    args.stream = check_stream(op, stream);

    const int32_t sum_dtype = dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
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
    Tensor value = args.reduction == Reduction::none ? new_empty(x0, {batch}, sum_dtype) : new_empty(x0, {}, sum_dtype);
    Tensor means = new_empty(x0, {batch, 2}, sum_dtype), samples = new_empty(x0, {batch}, sum_dtype);
    Tensor partials = new_empty(x0, {batch, blocks, 2}, sum_dtype);
    args.value = value.mutable_data_ptr();
    args.means = means.mutable_data_ptr();
    args.partials = partials.mutable_data_ptr();
    args.samples = samples.mutable_data_ptr();
    Backend::variational(args, x0);
    return {value, means, grad};
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("variational", TORCH_BOX(&VariationalOps::variational));
  }
};

}  // namespace dk::bind
