// The ops `quantile`, `dynamic_threshold` and `moments`.
#pragma once

#include "../core/moments.h"
#include "../core/quantile.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct StatisticsOps {
  static int64_t workspace_bytes(const Space& space) {
    if constexpr (Backend::kHost) {
      return cpu::quantile_workspace(space);
    } else {
      return cuda::quantile_workspace(space);
    }
  }

  static void run(const char* op, const QuantileArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      for (int64_t phase = 0; phase < cpu::quantile_phases(args); ++phase) {
        Backend::run_phase(args.space, cpu::quantile_tasks(args, phase), Backend::kGrainWithNoise,
                           [&](int64_t begin, int64_t end) { cpu::quantile(args, phase, begin, end); });
      }
    } else {
      Backend::launch(op, cuda::quantile, args, where);
    }
  }

  static void run(const char* op, const MomentsArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      for (int64_t phase = 0; phase < cpu::moments_phases(args.space); ++phase) {
        Backend::run_phase(args.space, cpu::moments_tasks(args.space, phase), Backend::kGrain,
                           [&](int64_t begin, int64_t end) { cpu::moments(args, phase, begin, end); });
      }
    } else {
      Backend::launch(op, cuda::moments, args, where);
    }
  }

  static void check_elements(const char* op, const Operand& x) {
    for (int64_t d = 1; d < x.dims; ++d) {
      if (x.sizes[d] == 0) fail(op, x.name, " must have an element in each sample, got shape ", shape_text(x));
    }
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
    const int64_t words = (workspace_bytes(args.space) + 7) / 8;
    Tensor workspace = new_empty(x, {words}, aoti_torch_dtype_int64());
    args.value = value.mutable_data_ptr();
    args.workspace = workspace.mutable_data_ptr();
    run(op, args, x);
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
    if (args.space.batch > 0) run(op, args, x);  // of an empty sample: NaN, as torch's mean of nothing
    return value;
  }

  static void define(StableLibrary& m) {
    m.def("quantile(Tensor x, float q) -> Tensor");
    m.def("dynamic_threshold(Tensor x0, float q, float maximum) -> Tensor");
    m.def("dynamic_threshold_out(Tensor x0, float q, float maximum, Tensor(a!) out) -> ()");
    m.def("moments(Tensor x) -> Tensor");
  }

  static void implement(StableLibrary& m) {
    m.impl("quantile", TORCH_BOX(&StatisticsOps::quantile));
    m.impl("dynamic_threshold", TORCH_BOX(&StatisticsOps::dynamic_threshold));
    m.impl("dynamic_threshold_out", TORCH_BOX(&StatisticsOps::dynamic_threshold_out));
    m.impl("moments", TORCH_BOX(&StatisticsOps::moments));
  }
};

}  // namespace dk::bind
