// The ops `learned_step` and `learned_step_out`.
#pragma once

#include <algorithm>

#include "../core/learned_step.h"
#include "memory.h"
#include "rows.h"
#include "step_checks.h"

namespace dk::bind {

template <class Backend>
struct LearnedStepOps {
  static Table table() { return {"learned_step", {DK_LEARNED_COLUMNS(DK_COLUMN_NAME)}}; }

  static void run(const LearnedStepArgs& args, const Operand& where, bool draws) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::learned_step, args, Backend::grain(draws));
    } else {
      Backend::launch("learned_step", cuda::learned_step, args, where);
    }
  }

  struct Operands {
    Operand x, m, table, index, seeds, noise, mask, known, out, x0, next;
  };

  static void check_row(const char* op, const Operands& o, const double* row, int64_t number, uint32_t want) {
    check_row_finite(op, row, kLearnedColumns, number);
    check_clip(op, row[kClip], number);
    check_learned_row(op, row, number);
    const uint32_t terms = learned_step_terms(row, want);
    need(op, o.m, terms & kTermQ, "q", row[kQ]);
    need(op, o.m, terms & kTermD, "d", row[kD]);
    need(op, o.m, terms & kTermV, "r1", row[kLogVariance1]);
    need(op, o.known, terms & kTermKnownS, "known_s", row[kKnownS]);
    check_row_noise(op, o.seeds, o.noise, terms, row, number);
  }

  static void step_into(const char* op, const Operands& o, int64_t row) {
    const Operand& out = o.out;
    check_batched(op, out);
    Backend::check(op, out);
    const int64_t batch = out.sizes[0];
    const Dtype state = float_dtype(op, out);
    for (const Operand* same : {&o.x, &o.noise, &o.known, &o.x0}) {
      if (!*same) continue;
      check_same_device(op, *same, out);
      check_dtype(op, *same, out);
      check_shape(op, *same, out);
    }
    check_same_device(op, o.m, out);
    check_learned_prediction(op, o.m, out);
    const Dtype m_dtype = o.m ? float_dtype(op, o.m) : state;
    const Mask mask(op, o.mask, out, state);
    const NextInput next(op, o.next, out, m_dtype);
    check_one_noise(op, o.seeds, o.noise, o.mask);

    LearnedStepArgs args{};
    args.state = state;
    args.seeds = check_seeds(op, o.seeds, out, batch);
    const uint32_t want = (o.x0 ? kWantX0 : 0u) | (o.mask ? kTermMask : 0u);
    bool draws = o.seeds.handle != nullptr;
    const auto check = [&](const double* values, int64_t number) { check_row(op, o, values, number, want); };
    if (const double* values = step_row<Backend>(op, o.table, o.index, row, out, kLearnedColumns, check, args.rows)) {
      std::copy_n(values, int{kLearnedColumns}, args.row);
      draws = draws && (learned_step_terms(values, want) & (kTermG | kTermKnownN));
    }
    for (const Operand* w : {&out, &o.x0, &o.next}) {
      if (*w) {
        check_output(op, *w, {&o.x, &o.noise, &mask.whole, &o.known}, {&o.m, &o.table, &o.index, &o.seeds},
                     {&out, &o.x0, &o.next});
      }
    }
    const Halves m(op, o.m, out.dims > 1 ? out.sizes[1] : 1, true);
    args.space = make_space(op, out, {&out, &o.x, &m.first, &m.second, &o.noise, &mask.whole, &o.known, &o.x0, &o.next},
                            draws, Backend::kMaxChannels);
    args.x = make_view(args.space, o.x, state);
    args.m = make_view(args.space, m.first, m_dtype);
    args.v = make_view(args.space, m.second, m_dtype);
    args.noise = make_view(args.space, o.noise, state);
    args.mask = make_view(args.space, mask.whole, mask.dtype);
    args.known = make_view(args.space, o.known, state);
    args.out = make_view(args.space, out, state);
    args.x0 = make_view(args.space, o.x0, state);
    args.next = make_view(args.space, o.next, next.dtype);
    if (next.doubled) args.next2 = second_half(args.next, batch);
    if (args.space.batch * args.space.count > 0) run(args, out, draws);
  }

  static std::tuple<Tensor, MaybeTensor, MaybeTensor> learned_step(
      Tensor x_tensor, MaybeTensor m, Tensor table, int64_t row, MaybeTensor index, MaybeTensor seeds,
      MaybeTensor noise, MaybeTensor mask, MaybeTensor known, bool want_x0, int64_t next_copies,
      std::optional<torch::headeronly::ScalarType> next_dtype) {
    const char* op = "learned_step";
    Operands o{{"x", x_tensor},
               {"m", m},
               {"table", table},
               {"index", index},
               {"seeds", seeds},
               {"noise", noise},
               {"mask", mask},
               {"known", known},
               {},
               {},
               {}};
    check_batched(op, o.x);
    if (next_copies < 0 || next_copies > 2) fail(op, "next_copies must be 0, 1 or 2, got ", next_copies);
    Tensor out = empty_like(o.x, o.x.dtype);
    MaybeTensor x0, next;
    if (want_x0) x0 = empty_like(o.x, o.x.dtype);
    if (next_copies > 0) {
      const int32_t dtype = next_dtype.has_value() ? static_cast<int32_t>(torch::stable::detail::from(*next_dtype))
                                                   : (o.m ? o.m.dtype : o.x.dtype);
      next = empty_like(o.x, dtype, next_copies);
    }
    o.out = {"x", out};  // a rule that it breaks is broken by x
    o.x0 = {"x0", x0};
    o.next = {"next", next};
    step_into(op, o, row);
    return {out, x0, next};
  }

  static void learned_step_out(Tensor x, MaybeTensor m, Tensor table, int64_t row, MaybeTensor index, MaybeTensor seeds,
                               MaybeTensor noise, MaybeTensor mask, MaybeTensor known, Tensor out, MaybeTensor x0,
                               MaybeTensor next) {
    step_into("learned_step",
              {{"x", x},
               {"m", m},
               {"table", table},
               {"index", index},
               {"seeds", seeds},
               {"noise", noise},
               {"mask", mask},
               {"known", known},
               {"out", out},
               {"x0", x0},
               {"next", next}},
              row);
  }

  static void define(StableLibrary& m) {
    m.def(
        "learned_step(Tensor x, Tensor? m, Tensor table, SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, "
        "Tensor? mask, Tensor? known, bool want_x0, int next_copies, ScalarType? next_dtype) -> "
        "(Tensor, Tensor?, Tensor?)");
    m.def(
        "learned_step_out(Tensor x, Tensor? m, Tensor table, SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, "
        "Tensor? mask, Tensor? known, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? next) -> ()");
  }

  static void implement(StableLibrary& m) {
    m.impl("learned_step", TORCH_BOX(&LearnedStepOps::learned_step));
    m.impl("learned_step_out", TORCH_BOX(&LearnedStepOps::learned_step_out));
  }
};

}  // namespace dk::bind
