// The op `group_norm_act` and its gradient.
#pragma once

#include <algorithm>
#include <cmath>

#include "../core/group_norm.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct GroupNormOps {
  static constexpr const char* kOp = "group_norm_act";

  template <class Phases, class Tasks, class Kernel>
  static void run_phases(const GroupNormArgs& args, const Phases& phases, const Tasks& tasks, const Kernel& kernel) {
    constexpr double kThreadWork = 16384;  // elements that a thread takes at least
    const NormProblem& p = args.problem;
    const double elements =
        static_cast<double>(p.batch) * static_cast<double>(p.channels) * static_cast<double>(p.positions);
    for (int64_t phase = 0; phase < phases(p); ++phase) {
      const int64_t count = tasks(p, phase);
      const double grain = kThreadWork * static_cast<double>(count) / std::max(elements, 1.0);
      Backend::over(count, std::max(int64_t{1}, static_cast<int64_t>(grain)),
                    [&](int64_t begin, int64_t end) { kernel(args, phase, begin, end); });
    }
  }

  static void run(const GroupNormArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      run_phases(args, cpu::group_norm_phases, cpu::group_norm_tasks, cpu::group_norm);
    } else {
      Backend::launch(kOp, cuda::group_norm, args, where);
    }
  }

  static void run_grad(const GroupNormArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      run_phases(args, cpu::group_norm_grad_phases, cpu::group_norm_grad_tasks, cpu::group_norm_grad);
    } else {
      Backend::launch(kOp, cuda::group_norm_grad, args, where);
    }
  }

  // ------------------------------------------------------------------------------------------------- memory
  static bool dense_batch(const Operand& o) { return o.sizes[0] <= 1 || o.strides[0] == o.numel() / o.sizes[0]; }

  // How the kernels read x: as it lies, or else a contiguous copy.
  static bool reads_last(const Operand& o) { return !rows_contiguous(o) && channels_last(o) && dense_batch(o); }
  static Tensor readable(const Tensor& tensor, const char* name) {
    const Operand o(name, tensor);
    if (o.numel() == 0 || rows_contiguous(o) || reads_last(o)) return tensor;
    Tensor copy = new_empty(o, {o.sizes, o.sizes + o.dims}, o.dtype);
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  static ChannelView view(const Operand& o) {
    if (!o) return {};
    return {o.data(), float_dtype(kOp, o), o.dims == 2 ? o.strides[0] : 0, o.strides[o.dims - 1]};
  }

  static View view_of(const Operand& o, Dtype dtype) {
    View view{};
    view.data = o.data();
    view.dtype = dtype;
    view.batch_stride = o.strides[0];
    return view;
  }

  // ------------------------------------------------------------------------------------------------- checks
  static void check_channels(const Operand& o, const Operand& x, bool of_sample) {
    if (!o) return;
    check_same_device(kOp, o, x);
    float_dtype(kOp, o);
    const int64_t channels = x.sizes[1];
    const bool same = of_sample ? o.dims == 2 && o.sizes[0] == x.sizes[0] && o.sizes[1] == channels
                                : o.dims == 1 && o.sizes[0] == channels;
    if (same) return;
    if (of_sample) {
      fail(kOp, o.name, " must have shape [batch, channels] = [", x.sizes[0], ", ", channels, "], got ", shape_text(o));
    }
    fail(kOp, o.name, " must have shape [channels] = [", channels, "], got ", shape_text(o));
  }

  static void check_statistics(const Operand& o, const Operand& x, const GroupNormArgs& args) {
    check_same_device(kOp, o, x);
    const int32_t dtype = sum_dtype(args.x.dtype);
    const NormProblem& p = args.problem;
    if (o.dtype != dtype) fail(kOp, o.name, " must be ", dtype_text(dtype), ", got ", dtype_text(o.dtype));
    if (o.dims != 2 || o.sizes[0] != p.batch || o.sizes[1] != p.groups || (p.groups > 1 && o.strides[1] != 1) ||
        (p.batch > 1 && o.strides[0] != p.groups)) {
      fail(kOp, o.name, " must be contiguous of shape [batch, groups] = [", p.batch, ", ", p.groups, "], got ",
           shape_text(o), " with strides ", shape_text(o.strides, o.dims));
    }
  }

  // The problem and the inputs that forward and backward share.
  static GroupNormArgs prepare(const Operand& x, int64_t groups, const Operand& weight, const Operand& bias,
                               const Operand& scale, const Operand& shift, const Operand& add, double eps,
                               int64_t act) {
    Backend::check(kOp, x);
    const Dtype dtype = float_dtype(kOp, x);
    if (x.dims < 2) {
      fail(kOp, x.name, " must have 2 dimensions or more, [batch, channels, positions...], got ", shape_text(x));
    }
    GroupNormArgs args{};
    NormProblem& p = args.problem;
    p.batch = x.sizes[0];
    p.channels = x.sizes[1];
    p.positions = 1;
    for (int64_t d = 2; d < x.dims; ++d) p.positions = times(p.positions, x.sizes[d]);
    if (p.channels == 0 || p.positions == 0) {
      fail(kOp, x.name, " must have an element in each sample, got shape ", shape_text(x));
    }
    if (groups < 1 || groups > p.channels || p.channels % groups != 0) {
      fail(kOp, "groups must divide the channels of ", x.name, ", ", p.channels, ", got ", groups);
    }
    if (!std::isfinite(eps) || eps < 0) fail(kOp, "eps must be finite and not negative, got ", eps);
    if (act != 0 && act != 1) fail(kOp, "act must be 0 (none) or 1 (silu), got ", act);
    check_channels(weight, x, false);
    check_channels(bias, x, false);
    check_channels(scale, x, true);
    check_channels(shift, x, true);
    check_channels(add, x, true);
    p.groups = groups;
    p.channels_last = reads_last(x) || p.positions == 1;
    p.silu = act == 1;
    p.eps = eps;
    args.x = view_of(x, dtype);
    args.weight = view(weight);
    args.bias = view(bias);
    args.scale = view(scale);
    args.shift = view(shift);
    args.add = view(add);
    return args;
  }

  static void allocate_work(const Operand& x, GroupNormArgs& args, Tensor& partials, Tensor& factors, Tensor& sums) {
    const NormProblem& p = args.problem;
    partials = new_empty(x, {p.batch, norm_blocks(p), p.channels, norm_terms(args)}, sum_dtype(args.x.dtype));
    factors = new_empty(x, {p.batch, kNormFactors, p.channels}, sum_dtype(args.x.dtype));
    args.partials = partials.mutable_data_ptr();
    args.factors = factors.mutable_data_ptr();
    sums = new_empty(x, {p.batch, kNormSums, p.channels}, aoti_torch_dtype_float64());
    args.sums = static_cast<double*>(sums.mutable_data_ptr());
  }

  static void check_dims(const Operand& x) {
    if (x.dims < 1) fail(kOp, x.name, " must have a batch dimension, got a tensor without dimensions");
  }

  // ----------------------------------------------------------------------------------------------------- ops
  static std::tuple<Tensor, Tensor, Tensor> group_norm_act(Tensor x_tensor, int64_t groups, MaybeTensor weight,
                                                           MaybeTensor bias, MaybeTensor scale, MaybeTensor shift,
                                                           MaybeTensor add, double eps, int64_t act) {
    check_dims({"x", x_tensor});
    const Tensor read = readable(x_tensor, "x");
    const Operand x("x", read);
    GroupNormArgs args = prepare(x, groups, {"weight", weight}, {"bias", bias}, {"scale", scale}, {"shift", shift},
                                 {"add", add}, eps, act);
    const NormProblem& p = args.problem;
    Tensor out = empty_like(x, x.dtype);
    Tensor mean = new_empty(x, {p.batch, p.groups}, sum_dtype(args.x.dtype));
    Tensor rstd = new_empty(x, {p.batch, p.groups}, sum_dtype(args.x.dtype));
    if (p.batch == 0) return {out, mean, rstd};
    Tensor partials, factors, sums;
    allocate_work(x, args, partials, factors, sums);
    args.out = view_of({"out", out}, args.x.dtype);
    args.mean = mean.mutable_data_ptr();
    args.rstd = rstd.mutable_data_ptr();
    run(args, x);
    return {out, mean, rstd};
  }

  // A gradient of the shape and dtype of a parameter that is there.
  static MaybeTensor gradient_of(const Operand& o, ChannelView& into) {
    if (!o) return std::nullopt;
    Tensor made = new_empty(o, {o.sizes, o.sizes + o.dims}, o.dtype);
    into = view({o.name, made});
    return made;
  }

  static std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor> group_norm_act_grad(
      Tensor grad_tensor, Tensor x_tensor, Tensor mean_tensor, Tensor rstd_tensor, int64_t groups, MaybeTensor weight,
      MaybeTensor bias, MaybeTensor scale, MaybeTensor shift, MaybeTensor add, int64_t act) {
    check_dims({"x", x_tensor});
    const Tensor read = readable(x_tensor, "x");
    const Operand x("x", read), mean("mean", mean_tensor), rstd("rstd", rstd_tensor), w("weight", weight),
        b("bias", bias), s("scale", scale), t("shift", shift), a("add", add), given("grad_out", grad_tensor);
    GroupNormArgs args = prepare(x, groups, w, b, s, t, a, 0.0, act);
    const NormProblem& p = args.problem;
    check_same_device(kOp, given, x);
    check_dtype(kOp, given, x);
    check_shape(kOp, given, x);
    check_statistics(mean, x, args);
    check_statistics(rstd, x, args);
    Tensor dx = empty_like(x, x.dtype);
    const MaybeTensor dw = gradient_of(w, args.d_weight), db = gradient_of(b, args.d_bias);
    const MaybeTensor ds = gradient_of(s, args.d_scale), dt = gradient_of(t, args.d_shift);
    const MaybeTensor da = gradient_of(a, args.d_add);
    if (p.batch == 0) {
      for (MaybeTensor of_channels : {dw, db}) {
        if (of_channels) torch::stable::zero_(*of_channels);
      }
      return {dx, dw, db, ds, dt, da};
    }
    Tensor grad = grad_tensor;
    const bool fits = p.positions == 1  ? rows_contiguous(given)
                      : p.channels_last ? channels_last(given)
                                        : rows_contiguous(given);
    if (!fits) {
      grad = empty_like(x, x.dtype);
      torch::stable::copy_(grad, grad_tensor);
    }
    Tensor partials, factors, sums;
    allocate_work(x, args, partials, factors, sums);
    args.grad_out = view_of({"grad_out", grad}, args.x.dtype);
    args.out = view_of({"dx", dx}, args.x.dtype);
    args.mean = mean.data();
    args.rstd = rstd.data();
    run_grad(args, x);
    return {dx, dw, db, ds, dt, da};
  }

  static void define(StableLibrary& m) {
    m.def(
        "group_norm_act(Tensor x, SymInt groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, "
        "Tensor? add, float eps, int act) -> (Tensor, Tensor, Tensor)");
    m.def(
        "group_norm_act_grad(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, SymInt groups, Tensor? weight, "
        "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? add, int act) -> (Tensor, Tensor?, Tensor?, Tensor?, "
        "Tensor?, Tensor?)");
  }

  static void implement(StableLibrary& m) {
    m.impl("group_norm_act", TORCH_BOX(&GroupNormOps::group_norm_act));
    m.impl("group_norm_act_grad", TORCH_BOX(&GroupNormOps::group_norm_act_grad));
  }
};

}  // namespace dk::bind
