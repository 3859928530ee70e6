// The ops `attention`, `spatial_attention` and their gradients.
#pragma once

#include <algorithm>

#include "attention_views.h"

namespace dk::bind {

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
  // What the device or its build cannot do.
  static void check_limit(const char* op, const AttentionProblem& p, const Operand& where, const char* limit) {
    if (limit == nullptr) return;
    const int capability = Backend::capability(op, where);
    fail(op, limit, ", got ", dtype_text(where.dtype), " with ", p.dim, " channels a head on ", device_text(where),
         " of compute capability ", capability / 10, ".", capability % 10);
  }

  // Tasks on the CPU: a thread takes so many that it gets about as many multiplications as waking it costs.
  template <class Kernel>
  static void run_tasks(const AttentionProblem& p, int64_t tasks, const Kernel& kernel) {
    constexpr double kThreadWork = 5e5;
    const double work = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.queries) *
                        static_cast<double>(p.keys) * static_cast<double>(2 * p.dim);
    const double grain = kThreadWork * static_cast<double>(tasks) / std::max(work, 1.0);
    Backend::over(tasks, std::max(int64_t{1}, static_cast<int64_t>(grain)), kernel);
  }

  static void run(const char* op, AttentionArgs& args, const Operand& where) {
    const AttentionProblem& p = args.problem;
    const bool empty = p.batch * p.heads * p.queries == 0;
    if constexpr (Backend::kHost) {
      if (empty) return;
      run_tasks(p, cpu::attention_tasks(p), [&](int64_t begin, int64_t end) { cpu::attention(args, begin, end); });
    } else {
      check_limit(op, p, where, cuda::attention_limit(p, Backend::capability(op, where)));
      if (empty) return;
      const Workspace workspace(where, cuda::attention_workspace(p));
      args.workspace = workspace.data;
      Backend::launch("attention", cuda::attention, args, where);
    }
  }

  static void run_grad(const char* op, AttentionGradArgs& args, const Operand& where) {
    const AttentionProblem& p = args.problem;
    const bool empty = p.batch * p.heads == 0;
    if constexpr (Backend::kHost) {
      if (empty) return;
      const Workspace workspace(where, cpu::attention_grad_workspace(p));
      args.workspace = workspace.data;
      for (int64_t phase = 0; phase < cpu::attention_grad_phases(p); ++phase) {
        run_tasks(p, cpu::attention_grad_tasks(p, phase),
                  [&](int64_t begin, int64_t end) { cpu::attention_grad(args, phase, begin, end); });
      }
    } else {
      args.capability = Backend::capability(op, where);
      check_limit(op, p, where, cuda::attention_grad_limit(p, args.capability));
      if (empty) return;
      const Workspace workspace(where, cuda::attention_grad_workspace(p));
      args.workspace = workspace.data;
      Backend::launch("attention_grad", cuda::attention_grad, args, where);
    }
  }

  static Tensor new_lse(const Operand& like, const AttentionProblem& p) {
    return new_empty(like, {p.batch, p.heads, p.queries}, lse_dtype(p.dtype));
  }

  static Tensor heads_like(const Operand& o) {
    std::array<int64_t, 4> strides;
    return new_dense(o, {o.sizes, 4}, heads_order(o), strides);
  }

  // [B, channels, positions...] in the memory format of qkv.
  static Tensor spatial_like(const Operand& qkv, int64_t channels) {
    std::vector<int64_t> sizes(qkv.sizes, qkv.sizes + qkv.dims);
    sizes[1] = channels;
    std::vector<int64_t> strides(sizes.size());
    const bool channels_last = spatial_view("spatial_attention", qkv).channels_last();
    return new_dense(qkv, sizes, spatial_order(qkv.dims, channels_last), strides);
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

  static void define(StableLibrary& m) {
    m.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
    m.def(
        "attention_grad(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> "
        "(Tensor, Tensor, Tensor)");
    m.def("spatial_attention(Tensor qkv, int heads, int order, float scale) -> (Tensor, Tensor)");
    m.def(
        "spatial_attention_grad(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int heads, int order, float "
        "scale) "
        "-> Tensor");
  }

  static void implement(StableLibrary& m) {
    m.impl("attention", TORCH_BOX(&AttentionOps::attention));
    m.impl("attention_grad", TORCH_BOX(&AttentionOps::attention_grad));
    m.impl("spatial_attention", TORCH_BOX(&AttentionOps::spatial_attention));
    m.impl("spatial_attention_grad", TORCH_BOX(&AttentionOps::spatial_attention_grad));
  }
};

}  // namespace dk::bind
