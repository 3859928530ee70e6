// The ops `conv3x3` and `pack_conv3x3`, on the CPU alone: a GPU's convolutions are cuDNN's.
#pragma once

#include <algorithm>

#include "../core/conv3x3.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct Conv3x3Ops {
  static constexpr const char *kOp = "conv3x3", *kPack = "pack_conv3x3";
  static constexpr double kThreadWork = 65536;       // products, or weights, that a thread takes at least
  static constexpr int64_t kPackedAtOnce = 1 << 20;  // numbers of weights that are packed for one call: in the L3 cache

  template <class Args>
  static void over(int64_t tasks, double work, const Args& args, void (*kernel)(const Args&, int64_t, int64_t)) {
    const double grain = kThreadWork * static_cast<double>(tasks) / std::max(work, 1.0);
    Backend::over(tasks, std::max(int64_t{1}, static_cast<int64_t>(std::min(grain, static_cast<double>(tasks)))),
                  [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  static void pack(const Conv3x3Weight& args) {
    over(cpu::conv3x3_pack_tasks(args), static_cast<double>(conv_packed_size(args.form, args.inputs, args.panels)),
         args, cpu::conv3x3_pack);
  }

  static void run(const Conv3x3Args& args) {
    const ConvShape& shape = kConvShapes[static_cast<int64_t>(args.form)];
    const double tiles = static_cast<double>(args.batch) * static_cast<double>(args.height) *
                         static_cast<double>(args.width) / static_cast<double>(shape.step * shape.step);
    over(cpu::conv3x3_tasks(args), tiles * static_cast<double>(conv_packed_size(args.form, args.inputs, args.panels)),
         args, cpu::conv3x3);
  }

  static void check_float(const char* op, const Operand& o, const Operand& x) {
    check_same_device(op, o, x);
    if (o.dtype != aoti_torch_dtype_float32()) fail(op, o.name, " must be float32, got ", dtype_text(o.dtype));
  }

  static ConvForm form_of(const char* op, int64_t form) {
    if (form < 0 || form > 2) fail(op, "form must be 0 (F(2, 3)), 1 (F(4, 3)) or 2 (upsampled), got ", form);
    return static_cast<ConvForm>(form);
  }

  static Conv3x3Weight weight_of(const char* op, const Operand& weight, int64_t form) {
    Backend::check(op, weight);
    check_float(op, weight, weight);
    if (weight.dims != 4 || weight.sizes[2] != 3 || weight.sizes[3] != 3) {
      fail(op, "weight must have shape [outputs, inputs, 3, 3], got ", shape_text(weight));
    }
    Conv3x3Weight args{};
    args.form = form_of(op, form);
    args.outputs = weight.sizes[0];
    args.inputs = weight.sizes[1];
    args.weight = static_cast<const float*>(weight.data());
    std::copy(weight.strides, weight.strides + 4, args.stride);
    args.panels = conv_panels(args.outputs);
    return args;
  }

  static Tensor pack_conv3x3(Tensor weight_tensor, int64_t form) {
    const Operand weight("weight", weight_tensor);
    Conv3x3Weight args = weight_of(kPack, weight, form);
    Tensor packed = new_empty(weight, {conv_packed_size(args.form, args.inputs, args.panels)}, weight.dtype);
    args.packed = static_cast<float*>(packed.mutable_data_ptr());
    pack(args);
    return packed;
  }

  static Tensor new_channels_last(const Operand& like, int64_t batch, int64_t channels, int64_t height, int64_t width) {
    const int64_t sizes[] = {batch, channels, height, width};
    const int64_t row = times(channels, width);
    const int64_t strides[] = {times(row, height), 1, row, channels};
    return allocate(like, sizes, strides, like.dtype);
  }

  // Channels are neighbours: as x lies, or a copy.
  static Tensor readable(const Operand& o, const Tensor& tensor) {
    if (o.numel() == 0 || o.sizes[1] == 1 || o.strides[1] == 1) return tensor;
    Tensor copy = new_channels_last(o, o.sizes[0], o.sizes[1], o.sizes[2], o.sizes[3]);
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  static Tensor contiguous(const Operand& o, const Tensor& tensor) {
    if (o.sizes[0] <= 1 || o.strides[0] == 1) return tensor;
    Tensor copy = new_empty(o, {o.sizes[0]}, o.dtype);
    torch::stable::copy_(copy, tensor);
    return copy;
  }

  static void check_x(const Operand& x, const Conv3x3Weight& weight) {
    if (x.dims != 4 || x.sizes[1] != weight.inputs) {
      fail(kOp, "x must have shape [batch, inputs, height, width] with the inputs of weight, ", weight.inputs, ", got ",
           shape_text(x));
    }
  }

  static Tensor conv3x3(Tensor x_tensor, Tensor weight_tensor, MaybeTensor bias_tensor, MaybeTensor packed_tensor,
                        int64_t form) {
    const Operand given("x", x_tensor), given_weight("weight", weight_tensor), bias("bias", bias_tensor);
    const Operand packed("packed", packed_tensor);
    Backend::check(kOp, given);
    check_float(kOp, given, given);
    check_same_device(kOp, given_weight, given);
    Conv3x3Weight weight = weight_of(kOp, given_weight, form);
    check_x(given, weight);
    if (bias) {
      check_float(kOp, bias, given);
      if (bias.dims != 1 || bias.sizes[0] != weight.outputs) {
        fail(kOp, "bias must have shape [outputs] = [", weight.outputs, "], got ", shape_text(bias));
      }
    }
    const int64_t size = conv_packed_size(weight.form, weight.inputs, weight.panels);
    if (packed) {
      check_float(kOp, packed, given);
      if (packed.dims != 1 || packed.sizes[0] != size) {
        fail(kOp, "packed must be what pack_conv3x3 made of this weight for the same upsample and precision, [", size,
             "], got ", shape_text(packed));
      }
      if (size > 0 && (packed.strides[0] != 1 || reinterpret_cast<uintptr_t>(packed.data()) % 64 != 0)) {
        fail(kOp, "packed must be what pack_conv3x3 made, contiguous and on 64 bytes: got a view, call clone()");
      }
    }
    const ConvShape& shape = kConvShapes[form];
    Conv3x3Args args{};
    args.form = weight.form;
    args.batch = given.sizes[0], args.height = given.sizes[2], args.width = given.sizes[3];
    args.inputs = weight.inputs, args.outputs = weight.outputs;
    const int64_t scale = shape.outputs / shape.step;
    Tensor out =
        new_channels_last(given, args.batch, args.outputs, times(scale, args.height), times(scale, args.width));
    if (args.batch == 0 || args.outputs == 0 || args.height == 0 || args.width == 0) return out;
    const Tensor read_x = readable(given, x_tensor);
    const Operand x("x", read_x);
    args.x = static_cast<const float*>(x.data());
    args.x_batch = x.strides[0], args.x_row = x.strides[2], args.x_pixel = x.strides[3];
    const Tensor read_bias = bias ? contiguous(bias, *bias_tensor) : read_x;
    args.bias = bias ? static_cast<const float*>(read_bias.data_ptr()) : nullptr;
    args.out = static_cast<float*>(out.mutable_data_ptr());
    args.panels = weight.panels;
    if (packed) {
      args.packed = static_cast<const float*>(packed.data());
      run(args);
      return out;
    }
    // Some panels at a time, which stay in the cache until they are used.
    const int64_t each = conv_packed_size(weight.form, weight.inputs, 1);
    const int64_t rounds = std::clamp<int64_t>((size + kPackedAtOnce - 1) / kPackedAtOnce, 1, weight.panels);
    const int64_t most = (weight.panels + rounds - 1) / rounds;
    Tensor memory = new_empty(given, {each * most}, given.dtype);
    weight.packed = static_cast<float*>(memory.mutable_data_ptr());
    args.packed = weight.packed;
    for (int64_t panel = 0; panel < conv_panels(args.outputs); panel += most) {
      weight.panel = args.panel = panel;
      weight.panels = args.panels = std::min(most, conv_panels(args.outputs) - panel);
      pack(weight);
      run(args);
    }
    return out;
  }

  static void define(StableLibrary& m) {
    m.def("pack_conv3x3(Tensor weight, int form) -> Tensor");
    m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, int form) -> Tensor");
  }

  static void implement(StableLibrary& m) {
    m.impl("pack_conv3x3", TORCH_BOX(&Conv3x3Ops::pack_conv3x3));
    m.impl("conv3x3", TORCH_BOX(&Conv3x3Ops::conv3x3));
  }
};

}  // namespace dk::bind
