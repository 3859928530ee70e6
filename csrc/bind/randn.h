// The ops `randn` and `randn_out`.
#pragma once

#include "../core/randn.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct RandnOps {
  static void run(const RandnArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::randn, args, Backend::kGrainWithNoise);
    } else {
      Backend::launch("randn", cuda::randn, args, where);
    }
  }

  static void randn_into(const char* op, const Operand& seeds, int64_t stream, const Operand& out) {
    check_batched(op, out);
    Backend::check(op, out);
    RandnArgs args{};
    args.stream = check_stream(op, stream);
    args.seeds = check_seeds(op, seeds, out, out.sizes[0]);
    const Dtype dtype = float_dtype(op, out);
    check_output(op, out, {}, {&seeds}, {});
    args.space = make_space(op, out, {&out}, true, Backend::kMaxChannels);
    args.out = make_view(args.space, out, dtype);
    if (args.space.batch * args.space.count > 0) run(args, out);
  }

  static void randn_out(Tensor seeds, int64_t stream, Tensor out) {
    randn_into("randn", {"seeds", seeds}, stream, {"out", out});
  }

  static Tensor randn(std::vector<int64_t> size, Tensor seeds, int64_t stream, torch::headeronly::ScalarType dtype) {
    const Operand s("seeds", seeds);
    check_size("randn", size);
    const int32_t code = static_cast<int32_t>(torch::stable::detail::from(dtype));
    check_seeds("randn", s, s, size[0]);
    Tensor out = new_empty(s, size, code);
    randn_into("randn", s, stream, {"out", out});
    return out;
  }

  static void define(StableLibrary& m) {
    m.def("randn(SymInt[] size, Tensor seeds, SymInt stream=0, ScalarType dtype=float) -> Tensor");
    m.def("randn_out(Tensor seeds, SymInt stream, Tensor(a!) out) -> ()");
  }

  static void implement(StableLibrary& m) {
    m.impl("randn", TORCH_BOX(&RandnOps::randn));
    m.impl("randn_out", TORCH_BOX(&RandnOps::randn_out));
  }
};

}  // namespace dk::bind
