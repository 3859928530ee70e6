// Tensors as the checks see them, and the sentences of the checks. Shared by the CPU and the CUDA ops, so that a rule
// stands once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../core/args.h"
#include "layout.h"

namespace dk::bind {

using torch::stable::Tensor;
using torch::stable::detail::StableLibrary;
using MaybeTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "diffkern." << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline void check_status(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) throw std::runtime_error("diffkern: a call into libtorch failed");
}

// A product of sizes. Those of an empty tensor, or of one that torch will refuse to make, may be beyond int64.
inline int64_t times(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

// A tensor's metadata, read once.
struct Operand {
  const char* name = nullptr;
  AtenTensorHandle handle = nullptr;
  int32_t dtype = -1, device_type = -1, device_index = -1;
  int64_t dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  int64_t byte_offset = 0;  // of a part of the tensor

  Operand() = default;
  Operand(const char* operand_name, const Tensor& tensor) : name(operand_name), handle(tensor.get()) {
    check_status(aoti_torch_get_dtype(handle, &dtype));
    check_status(aoti_torch_get_device_type(handle, &device_type));
    check_status(aoti_torch_get_device_index(handle, &device_index));
    check_status(aoti_torch_get_dim(handle, &dims));
    int64_t *size_data = nullptr, *stride_data = nullptr;
    check_status(aoti_torch_get_sizes(handle, &size_data));
    check_status(aoti_torch_get_strides(handle, &stride_data));
    sizes = size_data;
    strides = stride_data;
  }
  Operand(const char* operand_name, const MaybeTensor& tensor)
      : Operand(tensor.has_value() ? Operand(operand_name, *tensor) : Operand()) {
    name = operand_name;
  }

  explicit operator bool() const { return handle != nullptr; }
  void* data() const {
    void* pointer = nullptr;
    check_status(aoti_torch_get_data_ptr(handle, &pointer));
    return static_cast<char*>(pointer) + byte_offset;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t d = 0; d < dims; ++d) n = times(n, sizes[d]);
    return n;
  }
};

inline std::string shape_text(const int64_t* values, int64_t dims) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < dims; ++d) text << (d ? ", " : "") << values[d];
  text << ']';
  return text.str();
}
inline std::string shape_text(const Operand& o) { return shape_text(o.sizes, o.dims); }

inline std::string dtype_text(int32_t dtype) {
#define DK_TEXT(NAME, TYPE, TORCH) \
  if (dtype == aoti_torch_dtype_##TORCH()) return #TORCH;
  DK_STORED_DTYPES(DK_TEXT)
#undef DK_TEXT
#define DK_TEXT(TORCH) \
  if (dtype == aoti_torch_dtype_##TORCH()) return #TORCH;
  DK_TEXT(int64)
  DK_TEXT(int32)
  DK_TEXT(bool)
  DK_TEXT(uint8)
  DK_TEXT(int8)
  DK_TEXT(int16)
  DK_TEXT(uint16)
  DK_TEXT(uint32)
  DK_TEXT(uint64)
  DK_TEXT(float8_e5m2)
  DK_TEXT(float8_e4m3fn)
  DK_TEXT(float8_e5m2fnuz)
  DK_TEXT(float8_e4m3fnuz)
  DK_TEXT(complex32)
  DK_TEXT(complex64)
  DK_TEXT(complex128)
#undef DK_TEXT
  return "dtype number " + std::to_string(dtype);
}

inline std::string device_text(const Operand& o) {
  if (o.device_type == aoti_torch_device_type_cpu()) return "cpu";
  if (o.device_type == aoti_torch_device_type_cuda()) return "cuda:" + std::to_string(o.device_index);
  return "device type " + std::to_string(o.device_type);
}

inline bool is_mask_dtype(int32_t dtype) {
  return dtype == aoti_torch_dtype_bool() || dtype == aoti_torch_dtype_uint8();
}

inline int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
#define DK_NUMBER(NAME, TYPE, TORCH) \
  case Dtype::NAME:                  \
    return aoti_torch_dtype_##TORCH();
    DK_STORED_DTYPES(DK_NUMBER)
#undef DK_NUMBER
    case Dtype::u8:
      break;
  }
  return aoti_torch_dtype_uint8();
}

// In which the ops compute and add up: float64 for float64, else float32.
inline int32_t sum_dtype(Dtype dtype) {
  return dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline Dtype float_dtype(const char* op, const Operand& o) {
#define DK_DTYPE(NAME, TYPE, TORCH) \
  if (o.dtype == aoti_torch_dtype_##TORCH()) return Dtype::NAME;
  DK_STORED_DTYPES(DK_DTYPE)
#undef DK_DTYPE
  std::string allowed;
  const char* const names[] = {
#define DK_TEXT(NAME, TYPE, TORCH) #TORCH,
      DK_STORED_DTYPES(DK_TEXT)
#undef DK_TEXT
  };
  for (size_t i = 0; i < std::size(names); ++i) {
    allowed += std::string(i == 0 ? "" : i + 1 < std::size(names) ? ", " : " or ") + names[i];
  }
  fail(op, o.name, " must be ", allowed, ", got ", dtype_text(o.dtype));
}

inline void check_same_device(const char* op, const Operand& o, const Operand& first) {
  if (o && (o.device_type != first.device_type || o.device_index != first.device_index)) {
    fail(op, o.name, " must be on the device of ", first.name, " (", device_text(first), "), got ", device_text(o));
  }
}

inline void check_dtype(const char* op, const Operand& o, const Operand& first) {
  if (o && o.dtype != first.dtype) {
    fail(op, o.name, " must have the dtype of ", first.name, " (", dtype_text(first.dtype), "), got ",
         dtype_text(o.dtype));
  }
}

// Shape [copies B, ...] where `first` is [B, ...].
inline void check_shape(const char* op, const Operand& o, const Operand& first, int64_t copies = 1) {
  if (!o) return;
  bool same = o.dims == first.dims;
  for (int64_t d = 0; same && d < o.dims; ++d) same = o.sizes[d] == (d == 0 ? copies : 1) * first.sizes[d];
  if (!same) {
    fail(op, o.name, " must have the shape of ", first.name, copies == 2 ? " with its batch doubled, " : " ",
         shape_text(first), ", got ", shape_text(o));
  }
}

inline void check_batched(const char* op, const Operand& o) {
  if (o.dims < 1) fail(op, o.name, " must have a batch dimension, got a tensor without dimensions");
}

// Seeds are int64[B]; a stride-0 view (expand) is fine.
inline Seeds check_seeds(const char* op, const Operand& seeds, const Operand& like, int64_t batch) {
  if (!seeds) return {nullptr, 0};
  if (seeds.dtype != aoti_torch_dtype_int64()) fail(op, "seeds must be int64, got ", dtype_text(seeds.dtype));
  if (seeds.dims != 1 || seeds.sizes[0] != batch) {
    fail(op, "seeds must have shape [", batch, "] (one seed a sample), got ", shape_text(seeds));
  }
  check_same_device(op, seeds, like);
  return {static_cast<const int64_t*>(seeds.data()), seeds.strides[0]};
}

// The noise of training has one source.
inline void check_noise_source(const char* op, const Operand& seeds, const Operand& noise) {
  if (seeds && noise) fail(op, "give either seeds (noise by address) or noise (a tensor), got both");
  if (!seeds && !noise) fail(op, "seeds (noise by address) or noise (a tensor) must be given, got neither");
}

inline uint64_t check_stream(const char* op, int64_t stream) {
  if (stream < 0 || stream >= (int64_t{1} << 53)) fail(op, "stream must be in [0, 2^53), got ", stream);
  return static_cast<uint64_t>(stream);
}

}  // namespace dk::bind
