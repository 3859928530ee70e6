// The ops `noise_sum` and `noise_sum_out`.
#pragma once

#include <algorithm>
#include <cmath>

#include "../core/noise_sum.h"
#include "memory.h"

namespace dk::bind {

template <class Backend>
struct NoiseSumOps {
  static constexpr const char* kOp = "noise_sum";

  static void run(const NoiseSumArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {  // a block is the work of so many blocks as there are terms
      Backend::run(cpu::noise_sum, args, std::max<int64_t>(1, Backend::kGrainWithNoise / std::max(1, args.terms.n)));
    } else {
      Backend::launch(kOp, cuda::noise_sum, args, where);
    }
  }

  // A list of numbers on the CPU, whose values travel in the arguments.
  static void check_list(const Operand& list, int32_t dtype) {
    if (list.device_type != aoti_torch_device_type_cpu()) {
      fail(kOp, list.name, " must be on the CPU, got ", device_text(list));
    }
    if (list.dtype != dtype) fail(kOp, list.name, " must be ", dtype_text(dtype), ", got ", dtype_text(list.dtype));
    if (list.dims != 1) fail(kOp, list.name, " must have shape [n], got ", shape_text(list));
    if (list.sizes[0] > kMaxNoiseTerms) {
      fail(kOp, list.name, " must hold at most ", kMaxNoiseTerms, " terms, got ", list.sizes[0]);
    }
  }

  static NoiseTerms<double> read_terms(const Operand& streams, const Operand& weights) {
    check_list(streams, aoti_torch_dtype_int64());
    check_list(weights, aoti_torch_dtype_float64());
    const int64_t n = streams.sizes[0];
    if (weights.sizes[0] != n) {
      fail(kOp, "weights must have shape [", n, "] (one a stream), got ", shape_text(weights));
    }
    NoiseTerms<double> terms{};
    terms.n = static_cast<int32_t>(n);
    const auto* stream = static_cast<const int64_t*>(streams.data());
    const auto* weight = static_cast<const double*>(weights.data());
    for (int64_t j = 0; j < n; ++j) {
      const int64_t s = stream[j * streams.strides[0]];
      const double w = weight[j * weights.strides[0]];
      if (s < 0 || s >= (int64_t{1} << 53)) fail(kOp, "streams must be in [0, 2^53), got ", s, " at ", j);
      if (!std::isfinite(w)) fail(kOp, "weights must be finite, got ", w, " at ", j);
      terms.stream[j] = static_cast<uint64_t>(s);
      terms.weight[j] = w;
    }
    return terms;
  }

  static void into(const Operand& seeds, const Operand& streams, const Operand& weights, const Operand& out) {
    check_batched(kOp, out);
    Backend::check(kOp, out);
    NoiseSumArgs args{};
    args.seeds = check_seeds(kOp, seeds, out, out.sizes[0]);
    args.terms = read_terms(streams, weights);
    const Dtype dtype = float_dtype(kOp, out);
    check_output(kOp, out, {}, {&seeds, &streams, &weights}, {});
    args.space = make_space(kOp, out, {&out}, true, Backend::kMaxChannels);
    args.out = make_view(args.space, out, dtype);
    if (args.space.batch * args.space.count > 0) run(args, out);
  }

  static void noise_sum_out(Tensor seeds, Tensor streams, Tensor weights, Tensor out) {
    into({"seeds", seeds}, {"streams", streams}, {"weights", weights}, {"out", out});
  }

  static Tensor noise_sum(std::vector<int64_t> size, Tensor seeds, Tensor streams, Tensor weights,
                          torch::headeronly::ScalarType dtype) {
    const Operand s("seeds", seeds);
    check_size(kOp, size);
    check_seeds(kOp, s, s, size[0]);
    Tensor out = new_empty(s, size, static_cast<int32_t>(torch::stable::detail::from(dtype)));
    into(s, {"streams", streams}, {"weights", weights}, {"out", out});
    return out;
  }

  static void define(StableLibrary& m) {
    m.def("noise_sum(SymInt[] size, Tensor seeds, Tensor streams, Tensor weights, ScalarType dtype) -> Tensor");
    m.def("noise_sum_out(Tensor seeds, Tensor streams, Tensor weights, Tensor(a!) out) -> ()");
  }

  static void implement(StableLibrary& m) {
    m.impl("noise_sum", TORCH_BOX(&NoiseSumOps::noise_sum));
    m.impl("noise_sum_out", TORCH_BOX(&NoiseSumOps::noise_sum_out));
  }
};

}  // namespace dk::bind
