// Tensors as the checks see them, the sentences of the checks, and the layout of a call. Shared by the CPU and the
// CUDA ops, so that a rule stands once.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/args.h"

namespace dk::bind {

using torch::stable::Tensor;
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
    for (int64_t d = 0; d < dims; ++d) n *= sizes[d];
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
  if (dtype == aoti_torch_dtype_float64()) return "float64";
  if (dtype == aoti_torch_dtype_float32()) return "float32";
  if (dtype == aoti_torch_dtype_float16()) return "float16";
  if (dtype == aoti_torch_dtype_bfloat16()) return "bfloat16";
  if (dtype == aoti_torch_dtype_int64()) return "int64";
  if (dtype == aoti_torch_dtype_int32()) return "int32";
  if (dtype == aoti_torch_dtype_bool()) return "bool";
  if (dtype == aoti_torch_dtype_uint8()) return "uint8";
  if (dtype == aoti_torch_dtype_int8()) return "int8";
  if (dtype == aoti_torch_dtype_int16()) return "int16";
  if (dtype == aoti_torch_dtype_complex64()) return "complex64";
  if (dtype == aoti_torch_dtype_complex128()) return "complex128";
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

inline Dtype float_dtype(const char* op, const Operand& o) {
  if (o.dtype == aoti_torch_dtype_float32()) return Dtype::f32;
  if (o.dtype == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  if (o.dtype == aoti_torch_dtype_float16()) return Dtype::f16;
  if (o.dtype == aoti_torch_dtype_float64()) return Dtype::f64;
  fail(op, o.name, " must be float64, float32, float16 or bfloat16, got ", dtype_text(o.dtype));
}

inline int32_t torch_dtype(Dtype dtype) {
  switch (dtype) {
    case Dtype::f64:
      return aoti_torch_dtype_float64();
    case Dtype::f16:
      return aoti_torch_dtype_float16();
    case Dtype::bf16:
      return aoti_torch_dtype_bfloat16();
    default:
      return aoti_torch_dtype_float32();
  }
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

inline uint64_t check_stream(const char* op, int64_t stream) {
  if (stream < 0 || stream >= (int64_t{1} << 53)) fail(op, "stream must be in [0, 2^53), got ", stream);
  return static_cast<uint64_t>(stream);
}

inline const double* check_table(const char* op, const Operand& table, int64_t columns) {
  if (table.dtype != aoti_torch_dtype_float64()) fail(op, "table must be float64, got ", dtype_text(table.dtype));
  if (table.dims != 2 || table.sizes[1] != columns) {
    fail(op, "table must have shape [rows, ", columns, "], got ", shape_text(table));
  }
  if (table.strides[1] != 1 || (table.sizes[0] > 1 && table.strides[0] != columns)) {
    fail(op, "table must be contiguous, got strides ", shape_text(table.strides, table.dims));
  }
  return static_cast<const double*>(table.data());
}

// An index into the table: int64 or int32, one for all samples or one a sample; on the CPU its range is checked.
inline void check_index(const char* op, const Operand& index, int64_t batch, Rows& rows, bool on_host) {
  const bool narrow = index.dtype == aoti_torch_dtype_int32();
  if (!narrow && index.dtype != aoti_torch_dtype_int64()) {
    fail(op, "index must be int64 or int32, got ", dtype_text(index.dtype));
  }
  if (index.dims > 1 || (index.dims == 1 && index.sizes[0] != batch)) {
    fail(op, "index must have shape [] or [", batch, "], got ", shape_text(index));
  }
  rows.index = index.data();
  rows.index_is_int32 = narrow;
  rows.index_stride = index.dims == 1 ? index.strides[0] : 0;
  if (!on_host) return;
  for (int64_t b = 0; b < (index.dims == 1 ? batch : 1); ++b) {
    if (row_number(rows, b) < 0) {
      const int64_t at = b * rows.index_stride;
      const int64_t got =
          narrow ? static_cast<const int32_t*>(rows.index)[at] : static_cast<const int64_t*>(rows.index)[at];
      fail(op, "index must be in [0, ", rows.count, "), the rows of the table, got ", got, " for sample ", b);
    }
  }
}

inline void check_row_finite(const char* op, const double* row, int64_t columns, int64_t number) {
  for (int64_t k = 0; k < columns; ++k) {
    if (row[k] != row[k]) fail(op, "table must not hold NaN, got NaN in row ", number, ", column ", k);
  }
}

// --------------------------------------------------------------------------------------------- memory and layout
inline bool has_zero_stride(const Operand& o) {
  for (int64_t d = 0; d < o.dims; ++d) {
    if (o.sizes[d] > 1 && o.strides[d] == 0) return true;
  }
  return false;
}

// Bytes from the first to one past the last element; nothing for an empty tensor.
struct Extent {
  const char* begin;
  const char* end;
  bool dense;          // every byte belongs to an element
  bool overlaps_self;  // more elements than places (stride-0 dimensions not counted)
};
inline Extent extent(const Operand& o, int64_t item) {
  const char* begin = static_cast<const char*>(o.data());
  int64_t last = 0, count = 1;
  for (int64_t d = 0; d < o.dims; ++d) {
    if (o.sizes[d] == 0) return {begin, begin, false, false};
    if (o.strides[d] != 0) count *= o.sizes[d];
    last += (o.sizes[d] - 1) * o.strides[d];
  }
  return {begin, begin + (last + 1) * item, last + 1 <= count, last + 1 < count};
}

inline bool same_memory(const Operand& a, const Operand& b) {
  if (a.data() != b.data() || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int64_t d = 0; d < a.dims; ++d) {
    if (a.sizes[d] != b.sizes[d] || (a.sizes[d] > 1 && a.strides[d] != b.strides[d])) return false;
  }
  return true;
}

inline int64_t item_size(const char* op, const Operand& o) {
  if (o.dtype == aoti_torch_dtype_int64()) return 8;
  if (o.dtype == aoti_torch_dtype_int32()) return 4;
  return is_mask_dtype(o.dtype) ? 1 : size_of(float_dtype(op, o));
}

// An output may be exactly one of `inputs` (in place), but may not overlap one partly, nor any of `others` (read before
// or after the elements: tables, indices, seeds), nor another output.
inline void check_output(const char* op, const Operand& out, std::initializer_list<const Operand*> inputs,
                         std::initializer_list<const Operand*> others, std::initializer_list<const Operand*> outputs) {
  if (has_zero_stride(out)) {
    fail(op, out.name, " must not have stride 0 (an expanded tensor cannot be written), got strides ",
         shape_text(out.strides, out.dims));
  }
  const Extent mine = extent(out, item_size(op, out));
  if (mine.overlaps_self) {
    fail(op, out.name, " must not overlap itself in memory, got shape ", shape_text(out), " with strides ",
         shape_text(out.strides, out.dims));
  }
  const auto overlaps = [&](const Operand& other) {
    const Extent theirs = extent(other, item_size(op, other));
    return mine.dense && theirs.dense && mine.begin < theirs.end && theirs.begin < mine.end;
  };
  for (const Operand* in : inputs) {
    if (*in && overlaps(*in) && !same_memory(out, *in)) {
      fail(op, out.name, " must not overlap ", in->name, " in memory (the same tensor, in place, is fine)");
    }
  }
  for (const Operand* in : others) {
    if (*in && overlaps(*in)) fail(op, out.name, " must not overlap ", in->name, " in memory");
  }
  for (const Operand* other : outputs) {
    if (*other && other != &out && overlaps(*other)) {
      fail(op, out.name, " must not overlap the output ", other->name, " in memory");
    }
  }
}

// Row-major and without gaps inside a sample?
inline bool rows_contiguous(const Operand& o) {
  int64_t expected = 1;
  for (int64_t d = o.dims - 1; d >= 1; --d) {
    if (o.sizes[d] != 1 && o.strides[d] != expected) return false;
    expected *= o.sizes[d];
  }
  return true;
}

// [B, C, spatial...] stored as [B, spatial..., C]?
inline bool channels_last(const Operand& o) {
  if (o.dims < 3 || (o.sizes[1] != 1 && o.strides[1] != 1)) return false;
  int64_t expected = o.sizes[1];
  for (int64_t d = o.dims - 1; d >= 2; --d) {
    if (o.sizes[d] != 1 && o.strides[d] != expected) return false;
    expected *= o.sizes[d];
  }
  return true;
}

// The space of a call whose operands (absent ones allowed) all have the shape of `first`. `max_channels`: up to which
// C the backend has a channels_last path where noise is drawn.
inline Space make_space(const char* op, const Operand& first, const std::vector<const Operand*>& operands, bool draws,
                        int64_t max_channels) {
  Space space{};
  space.batch = first.sizes[0];
  space.count = 1;
  for (int64_t d = 1; d < first.dims; ++d) space.count *= first.sizes[d];
  space.channels = 1;
  if (space.batch == 0 || space.count == 0) return space;  // nothing to address: any layout serves
  bool contiguous = true, last = true;
  for (const Operand* o : operands) {
    if (!*o) continue;
    contiguous = contiguous && rows_contiguous(*o);
    last = last && channels_last(*o);
  }
  if (contiguous || (last && !draws)) {
    space.layout = Layout::contiguous;
    return space;
  }
  if (last && first.sizes[1] <= max_channels) {
    space.layout = Layout::channels_last;
    space.channels = first.sizes[1];
    return space;
  }
  space.layout = Layout::strided;
  for (int64_t d = 1; d < first.dims; ++d) {
    if (first.sizes[d] == 1) continue;
    bool merges = space.dims > 0;
    int64_t before = d - 1;
    while (before > 1 && first.sizes[before] == 1) --before;
    for (const Operand* o : operands) {
      if (*o && merges) merges = o->strides[before] == o->strides[d] * o->sizes[d];
    }
    if (merges) {
      space.size[space.dims - 1] *= first.sizes[d];
    } else {
      if (space.dims == kMaxDims) {
        fail(op, first.name, " must have at most ", kMaxDims, " dimensions that cannot be merged, got shape ",
             shape_text(first));
      }
      space.size[space.dims++] = first.sizes[d];
    }
  }
  return space;
}

// The strides of an operand in the merged dimensions of the space.
inline View make_view(const Space& space, const Operand& o, Dtype dtype) {
  View view{};
  if (!o) return view;
  view.data = o.data();
  view.dtype = dtype;
  view.batch_stride = o.sizes[0] == 0 ? 0 : o.strides[0];
  if (space.layout == Layout::strided) {
    int32_t k = space.dims - 1;
    int64_t left = k >= 0 ? space.size[k] : 1;
    for (int64_t d = o.dims - 1; d >= 1 && k >= 0; --d) {
      if (o.sizes[d] == 1) continue;
      if (left == space.size[k]) view.stride[k] = o.strides[d];
      left /= o.sizes[d];
      if (left == 1 && --k >= 0) left = space.size[k];
    }
  }
  return view;
}

inline Tensor allocate(const Operand& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       int32_t dtype) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, like.device_type, like.device_index,
                               &handle) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("diffkern: a tensor of shape " + shape_text(sizes.data(), dims) + " and dtype " +
                             dtype_text(dtype) + " could not be allocated on " + device_text(like));
  }
  return Tensor(handle);
}

// A new tensor on the device of `like`, [copies B, ...]: with its strides where they are dense and the batch is
// outermost, else contiguous (diffkern/ops/_common.py states the same rule for the fake tensors).
inline Tensor empty_like(const Operand& like, int32_t dtype, int64_t copies = 1) {
  std::vector<int64_t> sizes(like.sizes, like.sizes + like.dims), strides(like.strides, like.strides + like.dims);
  int64_t inner = 1;
  for (int64_t d = 1; d < like.dims; ++d) inner *= like.sizes[d];
  if (!((rows_contiguous(like) || channels_last(like)) && (like.sizes[0] <= 1 || like.strides[0] == inner))) {
    int64_t stride = 1;
    for (int64_t d = like.dims - 1; d >= 0; --d) {
      strides[d] = stride;
      stride *= like.sizes[d] > 1 ? like.sizes[d] : 1;
    }
  } else {
    strides[0] = inner;
  }
  sizes[0] *= copies;
  return allocate(like, sizes, strides, dtype);
}

inline Tensor new_empty(const Operand& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return allocate(like, sizes, strides, dtype);
}

}  // namespace dk::bind
