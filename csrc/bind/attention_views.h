// The tensors of attention as its kernels see them: heads, or [batch, channels, positions...], and the problem that
// they pose.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "../core/attention.h"
#include "memory.h"

namespace dk::bind {

// ------------------------------------------------------------------------------------------------- memory
// A tensor of these sizes without gaps, its axes from the outermost to the innermost in the given order. Strides as
// torch counts them: an axis of no elements takes the room of one; `strides` is room for them.
// diffkern/ops/_attention.py states this rule and the two orders below for the fake tensors.
inline Tensor new_dense(const Operand& like, std::span<const int64_t> sizes, std::span<const int64_t> order,
                        std::span<int64_t> strides) {
  int64_t stride = 1;
  for (size_t k = order.size(); k-- > 0;) {
    strides[order[k]] = stride;
    stride = times(stride, std::max(sizes[order[k]], int64_t{1}));
  }
  return allocate(like, sizes, strides, like.dtype);
}

// The order in which [B, H, N, D] lies in memory: its contiguous axis is the innermost, the others stand by descending
// stride. What strides cannot tell (size 1, stride 0, equal strides) stays in logical order.
inline std::array<int64_t, 4> heads_order(const Operand& o) {
  const bool token_inner = o.strides[3] != 1;
  std::array<int64_t, 3> outer{0, 1, token_inner ? 3 : 2};
  for (int d = 1; d < 3; ++d) {
    for (int k = d, j = d - 1; j >= 0; --j) {
      const int64_t a = outer[j], b = outer[k];
      if (o.sizes[a] == 1 || o.sizes[b] == 1 || o.strides[a] == 0 || o.strides[b] == 0) continue;
      if (o.strides[a] > o.strides[b]) break;
      if (o.strides[a] < o.strides[b]) {
        std::swap(outer[j], outer[k]);
        k = j;
      }
    }
  }
  return {outer[0], outer[1], outer[2], token_inner ? 2 : 3};
}

// [B, C, positions...]: channels_last where the positions are not contiguous.
inline std::vector<int64_t> spatial_order(int64_t dims, bool channels_last) {
  std::vector<int64_t> order{0};
  if (!channels_last) order.push_back(1);
  for (int64_t d = 2; d < dims; ++d) order.push_back(d);
  if (channels_last) order.push_back(1);
  return order;
}

// What the kernels see of one token's stride, which no address depends on: so that one stride is 1, and not both.
inline HeadsView with_token_stride(HeadsView view, int64_t tokens, int64_t dim) {
  if (tokens == 1) view.token = view.channel == 1 ? dim : 1;
  return view;
}

inline HeadsView heads_view(const Operand& o) {
  return with_token_stride({o.data(), o.strides[0], o.strides[1], o.strides[2], o.strides[3]}, o.sizes[2], o.sizes[3]);
}

// ------------------------------------------------------------------------------------------------- checks
inline Dtype attention_dtype(const char* op, const Operand& o) {
  const Dtype dtype = float_dtype(op, o);
  if (!attention_serves(dtype))
    fail(op, o.name, " must be of a dtype with attention kernels, got ", dtype_text(o.dtype));
  return dtype;
}

inline void check_head_dim(const char* op, const char* what, int64_t dim) {
  if (dim != kLargeHeadDim && (dim < kHeadDimStep || dim > kMaxHeadDim || dim % kHeadDimStep != 0)) {
    fail(op, what, " must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", or ", kLargeHeadDim, ", got ",
         dim);
  }
}

inline void check_scale(const char* op, double scale, Dtype dtype) {
  if (!std::isfinite(scale)) fail(op, "scale must be finite, got ", scale);
  if (dtype != Dtype::f64 && std::abs(scale) > std::numeric_limits<float>::max()) {
    fail(op, "scale must be finite in float32, got ", scale);
  }
}

inline void check_one_contiguous(const char* op, const Operand& o) {
  if (o.sizes[2] > 1 && o.strides[2] != 1 && o.strides[3] != 1) {
    fail(op, o.name, " must have stride 1 in its tokens or its channels (its last two dimensions), got strides ",
         shape_text(o.strides, o.dims), " for shape ", shape_text(o));
  }
}

inline void check_sizes(const char* op, const Operand& o, std::span<const int64_t> sizes, const char* rule) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  bool same = o.dims == dims;
  for (int64_t d = 0; same && d < dims; ++d) same = o.sizes[d] == sizes[d];
  if (!same) fail(op, o.name, " must have ", rule, " ", shape_text(sizes.data(), dims), ", got ", shape_text(o));
}

inline int32_t lse_dtype(Dtype dtype) {
  return dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

inline void check_lse(const char* op, const Operand& lse, const Operand& first, const AttentionProblem& p) {
  check_same_device(op, lse, first);
  if (lse.dtype != lse_dtype(p.dtype)) {
    fail(op, "lse must be ", dtype_text(lse_dtype(p.dtype)), " for ", first.name, " of ", dtype_text(first.dtype),
         ", got ", dtype_text(lse.dtype));
  }
  check_sizes(op, lse, std::array{p.batch, p.heads, p.queries}, "shape [batch, heads, queries] =");
  int64_t expected = 1;
  for (int64_t d = 2; d >= 0; --d) {
    if (lse.sizes[d] > 1 && lse.strides[d] != expected) {
      fail(op, "lse must be contiguous, got strides ", shape_text(lse.strides, lse.dims));
    }
    expected = times(expected, std::max(lse.sizes[d], int64_t{1}));
  }
}

// Sizes, strides and inputs of a call on q, k, v.
inline AttentionProblem heads_problem(const char* op, const Operand& q, const Operand& k, const Operand& v,
                                      double scale) {
  AttentionProblem p{};
  p.dtype = attention_dtype(op, q);
  for (const Operand* o : {&q, &k, &v}) {
    check_same_device(op, *o, q);
    check_dtype(op, *o, q);
    if (o->dims != 4) {
      fail(op, o->name, " must have 4 dimensions, [batch, heads, tokens, channels], got ", shape_text(*o));
    }
  }
  p.batch = q.sizes[0];
  p.heads = q.sizes[1];
  p.queries = q.sizes[2];
  p.dim = q.sizes[3];
  p.keys = k.sizes[2];
  check_head_dim(op, "the channels of q (its last dimension)", p.dim);
  const std::array keys_shape{p.batch, p.heads, p.keys, p.dim};
  check_sizes(op, k, keys_shape, "batch, heads and channels of q: shape");
  check_sizes(op, v, keys_shape, "the shape of k");
  if (p.keys < 1) fail(op, "k must have at least one token, got shape ", shape_text(k));
  check_scale(op, scale, p.dtype);
  p.scale = scale;
  for (const Operand* o : {&q, &k, &v}) check_one_contiguous(op, *o);
  p.q = heads_view(q);
  p.k = heads_view(k);
  p.v = heads_view(v);
  return p;
}

// ---------------------------------------------------------------------------------- [B, channels, positions...]
// Where q, k and v of a head stand among the 3 C channels. Numbers as in diffkern/ops/_attention.py.
enum class HeadOrder : int64_t {
  separate,    // [q, k, v] of [heads] of [D]
  by_head,     // [heads] of [q, k, v] of [D]
  by_channel,  // [heads] of [D] of [q, k, v]
};

// A tensor whose positions are one axis.
struct SpatialView {
  void* data;
  int64_t channels, tokens;
  int64_t batch, channel, token;  // strides
  bool channels_last() const { return tokens > 1 && token != 1; }
};

// Do all positions lie at one stride?
inline bool positions_merge(const Operand& o) {
  int64_t tokens = 1, stride = 1;
  for (int64_t d = o.dims - 1; d >= 2; --d) {
    if (o.sizes[d] == 0) return true;
    if (o.sizes[d] == 1) continue;
    if (tokens == 1) stride = o.strides[d];
    if (o.strides[d] != stride * tokens) return false;
    tokens = times(tokens, o.sizes[d]);
  }
  return true;
}

inline SpatialView spatial_view(const char* op, const Operand& o) {
  if (o.dims < 3) {
    fail(op, o.name, " must have 3 dimensions or more, [batch, channels, positions...], got ", shape_text(o));
  }
  if (!positions_merge(o)) {
    fail(op, o.name, " must have its positions one after the other (contiguous or channels_last), got strides ",
         shape_text(o.strides, o.dims), " for shape ", shape_text(o));
  }
  SpatialView view{o.data(), o.sizes[1], 1, o.strides[0], o.strides[1], 1};
  for (int64_t d = o.dims - 1; d >= 2; --d) {
    if (view.tokens == 1) view.token = o.strides[d];
    view.tokens = times(view.tokens, o.sizes[d]);
  }
  if (view.tokens < 1) fail(op, o.name, " must have at least one position, got shape ", shape_text(o));
  return view;
}

// One of q, k, v (part 0, 1, 2) of the heads.
inline HeadsView part_of(const SpatialView& qkv, HeadOrder order, int64_t dim, int part, Dtype dtype) {
  const int64_t heads = qkv.channels / (3 * dim);
  const int64_t step = order == HeadOrder::by_channel ? 3 : 1;
  const int64_t head = order == HeadOrder::separate ? dim : 3 * dim;
  const int64_t first = order == HeadOrder::separate ? heads * dim : order == HeadOrder::by_head ? dim : 1;
  char* data = static_cast<char*>(qkv.data) + part * first * qkv.channel * size_of(dtype);
  return with_token_stride({data, qkv.batch, head * qkv.channel, qkv.token, step * qkv.channel}, qkv.tokens, dim);
}

// [B, C, positions...] as heads, dense or not.
inline HeadsView heads_of(const char* op, const Operand& o, int64_t dim) {
  const SpatialView view = spatial_view(op, o);
  return with_token_stride({view.data, view.batch, dim * view.channel, view.token, view.channel}, view.tokens, dim);
}

// Sizes, strides and inputs of a call on qkv.
inline AttentionProblem spatial_problem(const char* op, const Operand& qkv, int64_t heads, int64_t order,
                                        double scale) {
  AttentionProblem p{};
  p.dtype = attention_dtype(op, qkv);
  const SpatialView view = spatial_view(op, qkv);
  if (heads < 1) fail(op, "heads must be at least 1, got ", heads);
  if (heads > std::max(view.channels, int64_t{3})) {  // beyond, 3 heads may not be a number
    fail(op, "heads must be at most a third of the channels of qkv, ", view.channels / 3, ", got ", heads);
  }
  if (view.channels < 1 || view.channels % 3 != 0 || view.channels / 3 % heads != 0) {
    fail(op, "the channels of qkv must be divisible by 3 heads = ", 3 * static_cast<uint64_t>(heads), ", got ",
         view.channels);
  }
  if (order < 0 || order > 2) fail(op, "order must be 0 (new), 1 (legacy) or 2 (edm), got ", order);
  p.batch = qkv.sizes[0];
  p.heads = heads;
  p.queries = p.keys = view.tokens;
  p.dim = view.channels / 3 / heads;
  check_head_dim(op, "the channels of a head (those of qkv / 3 / heads)", p.dim);
  check_scale(op, scale, p.dtype);
  p.scale = scale;
  const auto head_order = static_cast<HeadOrder>(order);
  if (view.channels_last() && view.channel != 1) {
    fail(op, "qkv must have stride 1 in its positions or its channels, got strides ", shape_text(qkv.strides, qkv.dims),
         " for shape ", shape_text(qkv));
  }
  if (view.channels_last() && head_order == HeadOrder::by_channel) {
    fail(op, "qkv must be contiguous for order 2 (edm), where q, k and v alternate channel by channel, got ",
         "channels_last strides ", shape_text(qkv.strides, qkv.dims), " for shape ", shape_text(qkv));
  }
  p.q = part_of(view, head_order, p.dim, 0, p.dtype);
  p.k = part_of(view, head_order, p.dim, 1, p.dtype);
  p.v = part_of(view, head_order, p.dim, 2, p.dtype);
  return p;
}

}  // namespace dk::bind
