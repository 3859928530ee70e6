// The memory of a call: what an output may overlap, the space and the views that the kernels see, new tensors.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <span>
#include <vector>

#include "operand.h"

namespace dk::bind {

// Several elements in one place: none in an empty tensor.
inline bool has_zero_stride(const Operand& o) {
  bool found = false;
  for (int64_t d = 0; d < o.dims; ++d) {
    if (o.sizes[d] == 0) return false;
    found = found || (o.sizes[d] > 1 && o.strides[d] == 0);
  }
  return found;
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
    expected = times(expected, o.sizes[d]);
  }
  return true;
}

// [B, C, spatial...] stored as [B, spatial..., C]?
inline bool channels_last(const Operand& o) {
  if (o.dims < 3 || (o.sizes[1] != 1 && o.strides[1] != 1)) return false;
  int64_t expected = o.sizes[1];
  for (int64_t d = o.dims - 1; d >= 2; --d) {
    if (o.sizes[d] != 1 && o.strides[d] != expected) return false;
    expected = times(expected, o.sizes[d]);
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
  for (int64_t d = 1; d < first.dims; ++d) space.count = times(space.count, first.sizes[d]);
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

inline Tensor allocate(const Operand& like, std::span<const int64_t> sizes, std::span<const int64_t> strides,
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
  for (int64_t d = 1; d < like.dims; ++d) inner = times(inner, like.sizes[d]);
  if (!((rows_contiguous(like) || channels_last(like)) && (like.sizes[0] <= 1 || like.strides[0] == inner))) {
    int64_t stride = 1;
    for (int64_t d = like.dims - 1; d >= 0; --d) {
      strides[d] = stride;
      stride = times(stride, std::max(like.sizes[d], int64_t{1}));
    }
  } else {
    strides[0] = inner;
  }
  sizes[0] = times(sizes[0], copies);
  return allocate(like, sizes, strides, dtype);
}

// The sizes of a tensor that an op makes.
inline void check_size(const char* op, const std::vector<int64_t>& size) {
  if (size.empty()) fail(op, "size must have a batch dimension, got []");
  for (const int64_t n : size) {
    if (n < 0) fail(op, "size must not be negative, got ", shape_text(size.data(), static_cast<int64_t>(size.size())));
  }
}

inline void set_contiguous(std::span<const int64_t> sizes, std::span<int64_t> strides) {
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride = times(stride, std::max(sizes[d], int64_t{1}));
  }
}

inline Tensor new_empty(const Operand& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  set_contiguous(sizes, strides);
  return allocate(like, sizes, strides, dtype);
}

// Of sizes in braces: without memory of their own, of which small calls notice each piece.
template <size_t N>
Tensor new_empty(const Operand& like, const int64_t (&sizes)[N], int32_t dtype) {
  int64_t strides[N];
  set_contiguous(sizes, strides);
  return allocate(like, sizes, strides, dtype);
}

}  // namespace dk::bind
