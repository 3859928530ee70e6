// The op `linear_rows`.
#pragma once

#include <algorithm>

#include "../core/linear_rows.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct LinearRowsOps {
  static constexpr const char* kOp = "linear_rows";

  static bool prepares(const LinearRowsArgs& args) {
    if constexpr (Backend::kHost) {
      return cpu::linear_rows_prepares(args);
    } else {
      return cuda::linear_rows_prepares(args);
    }
  }

  static void run(const LinearRowsArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      constexpr double kThreadWork = 65536;  // products that a thread takes at least
      const double products =
          static_cast<double>(args.rows) * static_cast<double>(args.inputs) * static_cast<double>(args.outputs);
      for (int64_t phase = 0; phase < cpu::linear_rows_phases(args); ++phase) {
        const int64_t count = cpu::linear_rows_tasks(args, phase);
        const double grain = kThreadWork * static_cast<double>(count) / std::max(products, 1.0);
        Backend::over(count, std::max(int64_t{1}, static_cast<int64_t>(std::min(grain, static_cast<double>(count)))),
                      [&](int64_t begin, int64_t end) { cpu::linear_rows(args, phase, begin, end); });
      }
    } else {
      Backend::launch(kOp, cuda::linear_rows, args, where);
    }
  }

  // Rows whose elements are neighbours: as they lie, or a copy.
  static Tensor readable(const Operand& o, const Tensor& tensor) {
    if (o.numel() == 0 || o.sizes[1] == 1 || o.strides[1] == 1) return tensor;
    Tensor copy = new_empty(o, {o.sizes, o.sizes + o.dims}, o.dtype);
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  static RowsView view(const Operand& o) { return {o.data(), o.sizes[0] > 1 ? o.strides[0] : o.sizes[1]}; }

  static void check_matrix(const Operand& o, const char* shape) {
    if (o.dims != 2) fail(kOp, o.name, " must have shape ", shape, ", got ", shape_text(o));
  }

  static Tensor linear_rows(Tensor x_tensor, Tensor weight_tensor, MaybeTensor bias_tensor, int64_t act) {
    const Operand given_x("x", x_tensor), given_weight("weight", weight_tensor), bias("bias", bias_tensor);
    Backend::check(kOp, given_x);
    LinearRowsArgs args{};
    args.dtype = float_dtype(kOp, given_x);
    check_matrix(given_x, "[rows, inputs]");
    check_same_device(kOp, given_weight, given_x);
    check_dtype(kOp, given_weight, given_x);
    check_matrix(given_weight, "[outputs, inputs]");
    args.rows = given_x.sizes[0];
    args.inputs = given_x.sizes[1];
    args.outputs = given_weight.sizes[0];
    if (given_weight.sizes[1] != args.inputs) {
      fail(kOp, "weight must have shape [outputs, inputs] with the inputs of x, ", args.inputs, ", got ",
           shape_text(given_weight));
    }
    if (bias) {
      check_same_device(kOp, bias, given_x);
      check_dtype(kOp, bias, given_x);
      if (bias.dims != 1 || bias.sizes[0] != args.outputs) {
        fail(kOp, "bias must have shape [outputs] = [", args.outputs, "], got ", shape_text(bias));
      }
      args.bias = bias.data();
      args.bias_stride = bias.strides[0];
    }
    if (act != 0 && act != 1) fail(kOp, "act must be 0 (none) or 1 (silu), got ", act);
    args.silu = act == 1;
    Tensor out = new_empty(given_x, {args.rows, args.outputs}, given_x.dtype);
    if (args.rows == 0 || args.outputs == 0) return out;
    const Tensor read_x = readable(given_x, x_tensor), read_weight = readable(given_weight, weight_tensor);
    const Operand x("x", read_x);
    args.x = view(x);
    args.weight = view({"weight", read_weight});
    args.out = view({"out", out});
    Tensor prepared;
    if (prepares(args)) {
      prepared = new_empty(x, {args.rows, args.inputs}, sum_dtype(args.dtype));
      args.prepared = prepared.mutable_data_ptr();
    }
    run(args, x);
    return out;
  }

  static void define(StableLibrary& m) {
    m.def("linear_rows(Tensor x, Tensor weight, Tensor? bias, int act) -> Tensor");
  }

  static void implement(StableLibrary& m) { m.impl("linear_rows", TORCH_BOX(&LinearRowsOps::linear_rows)); }
};

}  // namespace dk::bind
