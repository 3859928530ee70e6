// The attention ops over a backend (CPU or CUDA): check, describe, run. A backend gives
//   static void check(const char* op, const Operand&)                     is this its device?
//   static void check_limit(const char* op, const AttentionProblem&, const Operand& where, bool backward)
//   static int64_t attention_workspace(const AttentionProblem&)           bytes, and as many of the gradient:
//   static int64_t attention_grad_workspace(const AttentionProblem&)
//   static void attention(const AttentionArgs&, const Operand& where)
//   static void attention_grad(const AttentionGradArgs&, const Operand& where)
//
// Schemas of the functions below stand next to them in the same order in schemas.cpp.
#pragma once

#include <array>
#include <cmath>

#include "../core/attention.h"
#include "operand.h"

namespace dk::bind {

// ------------------------------------------------------------------------------------------------- memory
// A tensor of these sizes without gaps, its axes from the outermost to the innermost in the given order. Strides as
// torch counts them: an axis of no elements takes the room of one. diffkern/ops/_attention.py states this rule and
// the two orders below for the fake tensors.
inline Tensor new_dense(const Operand& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& order) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = order.size(); k-- > 0;) {
    strides[order[k]] = stride;
    stride *= sizes[order[k]] > 1 ? sizes[order[k]] : 1;
  }
  return allocate(like, sizes, strides, like.dtype);
}

// The order in which [B, H, N, D] lies in memory: its contiguous axis is the innermost, the others stand by descending
// stride. What strides cannot tell (size 1, stride 0, equal strides) stays in logical order.
inline std::vector<int64_t> heads_order(const Operand& o) {
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
inline void check_head_dim(const char* op, const char* what, int64_t dim) {
  if (dim != kLargeHeadDim && (dim < kHeadDimStep || dim > kMaxHeadDim || dim % kHeadDimStep != 0)) {
    fail(op, what, " must be a multiple of ", kHeadDimStep, " up to ", kMaxHeadDim, ", or ", kLargeHeadDim, ", got ",
         dim);
  }
}

inline void check_scale(const char* op, double scale) {
  if (!std::isfinite(scale)) fail(op, "scale must be finite, got ", scale);
}

inline void check_one_contiguous(const char* op, const Operand& o) {
  if (o.sizes[2] > 1 && o.strides[2] != 1 && o.strides[3] != 1) {
    fail(op, o.name, " must have stride 1 in its tokens or its channels (its last two dimensions), got strides ",
         shape_text(o.strides, o.dims), " for shape ", shape_text(o));
  }
}

inline void check_sizes(const char* op, const Operand& o, const std::vector<int64_t>& sizes, const char* rule) {
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
  check_sizes(op, lse, {p.batch, p.heads, p.queries}, "shape [batch, heads, queries] =");
  int64_t expected = 1;
  for (int64_t d = 2; d >= 0; --d) {
    if (lse.sizes[d] > 1 && lse.strides[d] != expected) {
      fail(op, "lse must be contiguous, got strides ", shape_text(lse.strides, lse.dims));
    }
    expected *= lse.sizes[d] > 1 ? lse.sizes[d] : 1;
  }
}

// Sizes, strides and inputs of a call on q, k, v.
inline AttentionProblem heads_problem(const char* op, const Operand& q, const Operand& k, const Operand& v,
                                      double scale) {
  AttentionProblem p{};
  p.dtype = float_dtype(op, q);
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
  check_sizes(op, k, {p.batch, p.heads, p.keys, p.dim}, "batch, heads and channels of q: shape");
  check_sizes(op, v, {p.batch, p.heads, p.keys, p.dim}, "the shape of k");
  if (p.keys < 1) fail(op, "k must have at least one token, got shape ", shape_text(k));
  check_scale(op, scale);
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
    tokens *= o.sizes[d];
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
    view.tokens *= o.sizes[d];
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
  p.dtype = float_dtype(op, qkv);
  const SpatialView view = spatial_view(op, qkv);
  if (heads < 1) fail(op, "heads must be at least 1, got ", heads);
  if (view.channels < 1 || view.channels % (3 * heads) != 0) {
    fail(op, "the channels of qkv must be divisible by 3 heads = ", 3 * heads, ", got ", view.channels);
  }
  if (order < 0 || order > 2) fail(op, "order must be 0 (new), 1 (legacy) or 2 (edm), got ", order);
  p.batch = qkv.sizes[0];
  p.heads = heads;
  p.queries = p.keys = view.tokens;
  p.dim = view.channels / (3 * heads);
  check_head_dim(op, "the channels of a head (those of qkv / 3 / heads)", p.dim);
  check_scale(op, scale);
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

// ----------------------------------------------------------------------------------------------------- ops
// Bytes on the device of `like`, 256-byte aligned as the kernels want them (torch's CPU allocator aligns to 64).
struct Workspace {
  Workspace(const Operand& like, int64_t bytes) {
    if (bytes == 0) return;
    memory = new_empty(like, {bytes + 255}, aoti_torch_dtype_uint8());
    const auto address = reinterpret_cast<uintptr_t>(memory->mutable_data_ptr());
    data = reinterpret_cast<void*>((address + 255) / 256 * 256);
  }
  MaybeTensor memory;
  void* data = nullptr;
};

template <class Backend>
struct AttentionOps {
  static void run(const char* op, AttentionArgs& args, const Operand& where) {
    const AttentionProblem& p = args.problem;
    Backend::check_limit(op, p, where, false);
    if (p.batch * p.heads * p.queries == 0) return;
    const Workspace workspace(where, Backend::attention_workspace(p));
    args.workspace = workspace.data;
    Backend::attention(args, where);
  }

  static void run_grad(const char* op, AttentionGradArgs& args, const Operand& where) {
    const AttentionProblem& p = args.problem;
    Backend::check_limit(op, p, where, true);
    if (p.batch * p.heads == 0) return;
    const Workspace workspace(where, Backend::attention_grad_workspace(p));
    args.workspace = workspace.data;
    Backend::attention_grad(args, where);
  }

  static Tensor new_lse(const Operand& like, const AttentionProblem& p) {
    return new_empty(like, {p.batch, p.heads, p.queries}, lse_dtype(p.dtype));
  }

  static Tensor heads_like(const Operand& o) { return new_dense(o, {o.sizes, o.sizes + o.dims}, heads_order(o)); }

  // [B, channels, positions...] in the memory format of qkv.
  static Tensor spatial_like(const Operand& qkv, int64_t channels) {
    std::vector<int64_t> sizes(qkv.sizes, qkv.sizes + qkv.dims);
    sizes[1] = channels;
    return new_dense(qkv, sizes, spatial_order(qkv.dims, spatial_view("spatial_attention", qkv).channels_last()));
  }

  // ------------------------------------------------------------------------------------------- attention
  static std::tuple<Tensor, Tensor> attention(Tensor q_tensor, Tensor k_tensor, Tensor v_tensor, double scale) {
    const char* op = "attention";
    const Operand q("q", q_tensor), k("k", k_tensor), v("v", v_tensor);
    AttentionArgs args{};
    args.problem = heads_problem(op, q, k, v, scale);
    Backend::check(op, q);
    Tensor out = heads_like(q), lse = new_lse(q, args.problem);
    args.out = heads_view({"out", out});
    args.lse = lse.mutable_data_ptr();
    run(op, args, q);
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor> attention_grad(Tensor grad_out_tensor, Tensor q_tensor, Tensor k_tensor,
                                                           Tensor v_tensor, Tensor out_tensor, Tensor lse_tensor,
                                                           double scale) {
    const char* op = "attention_grad";
    const Operand grad_out("grad_out", grad_out_tensor), q("q", q_tensor), k("k", k_tensor), v("v", v_tensor),
        out("out", out_tensor), lse("lse", lse_tensor);
    AttentionGradArgs args{};
    args.problem = heads_problem(op, q, k, v, scale);
    Backend::check(op, q);
    for (const Operand* o : {&grad_out, &out}) {
      check_same_device(op, *o, q);
      check_dtype(op, *o, q);
      check_shape(op, *o, q);
    }
    check_one_contiguous(op, out);
    check_lse(op, lse, q, args.problem);
    Tensor dq = heads_like(q), dk = heads_like(k), dv = heads_like(v);
    args.out = heads_view(out);
    args.grad_out = heads_view(grad_out);
    args.lse = lse.data();
    args.dq = heads_view({"dq", dq});
    args.dk = heads_view({"dk", dk});
    args.dv = heads_view({"dv", dv});
    if (args.problem.queries == 0) {  // no query: no term in the sums over them
      torch::stable::zero_(dk);
      torch::stable::zero_(dv);
    } else {
      run_grad(op, args, q);
    }
    return {dq, dk, dv};
  }

  // ----------------------------------------------------------------------------------- spatial_attention
  static std::tuple<Tensor, Tensor> spatial_attention(Tensor qkv_tensor, int64_t heads, int64_t order, double scale) {
    const char* op = "spatial_attention";
    const Operand qkv("qkv", qkv_tensor);
    Backend::check(op, qkv);
    AttentionArgs args{};
    args.problem = spatial_problem(op, qkv, heads, order, scale);
    Tensor out = spatial_like(qkv, qkv.sizes[1] / 3), lse = new_lse(qkv, args.problem);
    args.out = heads_of(op, {"out", out}, args.problem.dim);
    args.lse = lse.mutable_data_ptr();
    run(op, args, qkv);
    return {out, lse};
  }

  static Tensor spatial_attention_grad(Tensor grad_out_tensor, Tensor qkv_tensor, Tensor out_tensor, Tensor lse_tensor,
                                       int64_t heads, int64_t order, double scale) {
    const char* op = "spatial_attention_grad";
    const Operand qkv("qkv", qkv_tensor), out("out", out_tensor), lse("lse", lse_tensor);
    Operand grad_out("grad_out", grad_out_tensor);
    Backend::check(op, qkv);
    AttentionGradArgs args{};
    args.problem = spatial_problem(op, qkv, heads, order, scale);
    std::vector<int64_t> sizes(qkv.sizes, qkv.sizes + qkv.dims);
    sizes[1] /= 3;
    for (const Operand* o : std::initializer_list<const Operand*>{&grad_out, &out}) {
      check_same_device(op, *o, qkv);
      check_dtype(op, *o, qkv);
      check_sizes(op, *o, sizes, "the shape of qkv with a third of its channels,");
    }
    check_lse(op, lse, qkv, args.problem);
    if (!positions_merge(grad_out)) {  // transposed after the attention, say: the one copy there is
      grad_out_tensor = torch::stable::contiguous(grad_out_tensor);
      grad_out = {"grad_out", grad_out_tensor};
    }
    Tensor dqkv = spatial_like(qkv, qkv.sizes[1]);
    args.out = heads_of(op, out, args.problem.dim);
    args.grad_out = heads_of(op, grad_out, args.problem.dim);
    args.lse = lse.data();
    const SpatialView slices = spatial_view(op, {"dqkv", dqkv});
    HeadsView* parts[] = {&args.dq, &args.dk, &args.dv};
    for (int part = 0; part < 3; ++part) {
      *parts[part] = part_of(slices, static_cast<HeadOrder>(order), args.problem.dim, part, args.problem.dtype);
    }
    run_grad(op, args, qkv);
    return dqkv;
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("attention", TORCH_BOX(&AttentionOps::attention));
    m.impl("attention_grad", TORCH_BOX(&AttentionOps::attention_grad));
    m.impl("spatial_attention", TORCH_BOX(&AttentionOps::spatial_attention));
    m.impl("spatial_attention_grad", TORCH_BOX(&AttentionOps::spatial_attention_grad));
  }
};

}  // namespace dk::bind
