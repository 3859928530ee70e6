// The ops `noising` and `noising_out`.
#pragma once

#include "../core/noising.h"
#include "memory.h"
#include "rows.h"

namespace dk::bind {

template <class Backend>
struct NoisingOps {
  static Table table() { return {"noising", {DK_NOISING_COLUMNS(DK_COLUMN_NAME)}}; }

  static void run(const NoisingArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::noising, args, Backend::grain(args.seeds.data != nullptr));
    } else {
      Backend::launch("noising", cuda::noising, args, where);
    }
  }

  static void noising_into(const Operand& x0, const Operand& table, const Operand& index, const Operand& seeds,
                           int64_t stream, const Operand& noise, const Operand& out, const Operand& target,
                           const Operand& eps) {
    const char* op = "noising";
    check_batched(op, x0);
    Backend::check(op, x0);
    const Dtype dtype = float_dtype(op, x0);
    for (const Operand* o : {&noise, &out, &target, &eps}) {
      check_same_device(op, *o, x0);
      check_dtype(op, *o, x0);
      check_shape(op, *o, x0);
    }
    check_noise_source(op, seeds, noise);
    NoisingArgs args{};
    args.rows = sample_rows<Backend>(op, table, index, x0, kNoisingColumns);
    args.seeds = check_seeds(op, seeds, x0, x0.sizes[0]);
    args.stream = check_stream(op, stream);
    check_output(op, out, {&x0, &noise}, {&table, &index, &seeds}, {&out, &target, &eps});
    for (const Operand* o : {&target, &eps}) {  // written before the inputs are read for the last time
      if (*o) check_output(op, *o, {}, {&x0, &noise, &table, &index, &seeds}, {&out, &target, &eps});
    }
    args.space = make_space(op, x0, {&x0, &noise, &out, &target, &eps}, seeds.handle != nullptr, Backend::kMaxChannels);
    args.x0 = make_view(args.space, x0, dtype);
    args.noise = make_view(args.space, noise, dtype);
    args.out = make_view(args.space, out, dtype);
    args.target = make_view(args.space, target, dtype);
    args.eps = make_view(args.space, eps, dtype);
    if (args.space.batch * args.space.count > 0) run(args, x0);
  }

  static std::tuple<Tensor, MaybeTensor, MaybeTensor> noising(Tensor x0, Tensor table, MaybeTensor index,
                                                              MaybeTensor seeds, int64_t stream, MaybeTensor noise,
                                                              bool want_target, bool want_eps) {
    const Operand x("x0", x0);
    check_batched("noising", x);
    Tensor out = empty_like(x, x.dtype);
    MaybeTensor target, eps;
    if (want_target) target = empty_like(x, x.dtype);
    if (want_eps) eps = empty_like(x, x.dtype);
    noising_into(x, {"table", table}, {"index", index}, {"seeds", seeds}, stream, {"noise", noise}, {"out", out},
                 {"target", target}, {"eps", eps});
    return {out, target, eps};
  }

  static void noising_out(Tensor x0, Tensor table, MaybeTensor index, MaybeTensor seeds, int64_t stream,
                          MaybeTensor noise, Tensor out, MaybeTensor target, MaybeTensor eps) {
    noising_into({"x0", x0}, {"table", table}, {"index", index}, {"seeds", seeds}, stream, {"noise", noise},
                 {"out", out}, {"target", target}, {"eps", eps});
  }

  static void define(StableLibrary& m) {
    m.def(
        "noising(Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, bool "
        "want_target, "
        "bool want_eps) -> (Tensor, Tensor?, Tensor?)");
    m.def(
        "noising_out(Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
        "Tensor(a!) out, Tensor(b!)? target, Tensor(c!)? eps) -> ()");
  }

  static void implement(StableLibrary& m) {
    m.impl("noising", TORCH_BOX(&NoisingOps::noising));
    m.impl("noising_out", TORCH_BOX(&NoisingOps::noising_out));
  }
};

}  // namespace dk::bind
