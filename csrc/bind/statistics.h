// The ops `quantile`, `dynamic_threshold` and `moments` over a backend, which gives
//   static void check(const char* op, const Operand&)
//   static int64_t quantile_workspace(const Space&)
//   static void quantile(const char* op, const QuantileArgs&, const Operand& where)
//   static void moments(const MomentsArgs&, const Operand& where)
#pragma once

#include "../core/moments.h"
#include "../core/quantile.h"
#include "operand.h"

namespace dk::bind {

template <class Backend>
struct StatisticsOps {
  static void check_elements(const char* op, const Operand& x) {
    for (int64_t d = 1; d < x.dims; ++d) {
      if (x.sizes[d] == 0) fail(op, x.name, " must have an element in each sample, got shape ", shape_text(x));
    }
  }

  static int32_t sum_dtype(Dtype dtype) {
    return dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  }

  // The quantiles [B] of |x|; with `out`, x thresholded as well.
  static Tensor select(const char* op, const Operand& x, double q, double maximum, const Operand& out) {
    check_batched(op, x);
    Backend::check(op, x);
    const Dtype dtype = float_dtype(op, x);
    check_elements(op, x);
    if (!(q >= 0 && q <= 1)) fail(op, "q must be in [0, 1], got ", q);
    if (!(maximum >= 1)) fail(op, "maximum must be at least 1 (inf: no limit), got ", maximum);
    check_same_device(op, out, x);
    check_dtype(op, out, x);
    check_shape(op, out, x);
    if (out) check_output(op, out, {&x}, {}, {});
    QuantileArgs args{};
    args.space = make_space(op, x, {&x, &out}, false, 0);
    args.x = make_view(args.space, x, dtype);
    args.out = make_view(args.space, out, dtype);
    set_ranks(args, q);
    args.maximum = maximum;
    Tensor value = new_empty(x, {x.sizes[0]}, sum_dtype(dtype));
    if (args.space.batch == 0) return value;
    const int64_t words = (Backend::quantile_workspace(args.space) + 7) / 8;
    Tensor workspace = new_empty(x, {words}, aoti_torch_dtype_int64());
    args.value = value.mutable_data_ptr();
    args.workspace = workspace.mutable_data_ptr();
    Backend::quantile(op, args, x);
    return value;
  }

  static Tensor quantile(Tensor x, double q) { return select("quantile", {"x", x}, q, INFINITY, {}); }

  static void dynamic_threshold_out(Tensor x0, double q, double maximum, Tensor out) {
    select("dynamic_threshold", {"x0", x0}, q, maximum, {"out", out});
  }

  static Tensor dynamic_threshold(Tensor x0, double q, double maximum) {
    const Operand x("x0", x0);
    check_batched("dynamic_threshold", x);
    Tensor out = empty_like(x, x.dtype);
    select("dynamic_threshold", x, q, maximum, {"out", out});
    return out;
  }

  static Tensor moments(Tensor x_tensor) {
    const char* op = "moments";
    const Operand x("x", x_tensor);
    check_batched(op, x);
    Backend::check(op, x);
    const Dtype dtype = float_dtype(op, x);
    MomentsArgs args{};
    args.space = make_space(op, x, {&x}, false, 0);
    args.x = make_view(args.space, x, dtype);
    const int64_t blocks = sum_blocks(args.space.count);
    Tensor value = new_empty(x, {args.space.batch, 2}, sum_dtype(dtype));
    Tensor partials = new_empty(x, {args.space.batch, blocks}, sum_dtype(dtype));
    args.value = value.mutable_data_ptr();
    args.partials = partials.mutable_data_ptr();
    if (args.space.batch > 0) Backend::moments(args, x);  // of an empty sample: NaN, as torch's mean of nothing
    return value;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantile", TORCH_BOX(&StatisticsOps::quantile));
    m.impl("dynamic_threshold", TORCH_BOX(&StatisticsOps::dynamic_threshold));
    m.impl("dynamic_threshold_out", TORCH_BOX(&StatisticsOps::dynamic_threshold_out));
    m.impl("moments", TORCH_BOX(&StatisticsOps::moments));
  }
};

}  // namespace dk::bind
