// The ops `step`, `step_ad` and `step_out`.
#pragma once

#include <algorithm>

#include "../core/step.h"
#include "memory.h"
#include "rows.h"
#include "step_checks.h"

namespace dk::bind {

template <class Backend>
struct StepOps {
  static Table table() { return {"step", {DK_STEP_COLUMNS(DK_COLUMN_NAME)}}; }

  static void run(const StepArgs& args, const Operand& where, bool draws) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::step, args, Backend::grain(draws));
    } else {
      Backend::launch("step", cuda::step, args, where);
    }
  }

  struct StepOperands {
    Operand x, m, m2, h[kHistories], table, index, seeds, noise, mask, known, out, x0, s, next;
  };

  // The state's shape, dtype and device come from here.
  static const Operand& state_like(const StepOperands& o) {
    for (const Operand* state : {&o.x, &o.h[0], &o.h[1], &o.h[2], &o.h[3], &o.noise, &o.known, &o.out}) {
      if (*state) return *state;
    }
    if (!o.m) fail("step", "x, m, a history, noise or out must be given, got none");
    return o.m;
  }

  // Host rows: every operand that the row reads must be there.
  static void check_row(const StepOperands& o, const double* row, int64_t number, uint32_t want) {
    const char* op = "step";
    check_row_finite(op, row, kColumns, number);
    check_clip(op, row[kClip], number);
    const uint32_t terms = step_terms(row, want);
    need(op, o.x, terms & kTermP, "p", row[kP]);
    need(op, o.x, terms & kTermA, "a", row[kA]);
    need(op, o.x, terms & kTermSlopeA, "A", row[kSlopeA]);
    need(op, o.m, terms & kTermQ, "q", row[kQ]);
    need(op, o.m, terms & kTermD, "d", row[kD]);
    need(op, o.m, terms & kTermSlopeD, "D", row[kSlopeD]);
    const int64_t batch = o.out.sizes[0];  // an empty batch doubled is an empty batch
    const bool guided = o.m && (o.m2 || o.m.sizes[0] != batch || batch == 0);
    if ((terms & kTermW) && !guided) {
      fail(op, "m must hold two predictions for guidance (a doubled batch [uncond | cond], or m2): the row has w = ",
           row[kW]);
    }
    static const char* const kWhy[kHistories] = {"e0", "e1", "e2", "e3"};
    for (int k = 0; k < kHistories; ++k) need(op, o.h[k], terms & (kTermE0 << k), kWhy[k], row[kE0 + k]);
    need(op, o.known, terms & kTermKnownS, "known_s", row[kKnownS]);
    check_row_noise(op, o.seeds, o.noise, terms, row, number);
  }

  static void step_into(const StepOperands& o, int64_t row) {
    const char* op = "step";
    const Operand& out = o.out;
    check_batched(op, out);
    Backend::check(op, out);
    const int64_t batch = out.sizes[0];
    const Dtype state = float_dtype(op, out);
    for (const Operand* same : {&o.x, &o.h[0], &o.h[1], &o.h[2], &o.h[3], &o.noise, &o.known, &o.x0, &o.s}) {
      if (!*same) continue;
      check_same_device(op, *same, out);
      check_dtype(op, *same, out);
      check_shape(op, *same, out);
    }
    const bool doubled = o.m && !o.m2 && o.m.dims > 0 && o.m.sizes[0] == 2 * batch && batch > 0;
    Dtype m_dtype = state;
    if (o.m) {
      check_same_device(op, o.m, out);
      check_shape(op, o.m, out, doubled ? 2 : 1);
      m_dtype = float_dtype(op, o.m);
    }
    if (o.m2) {
      if (!o.m) fail(op, "m must be given with m2, got None");
      check_same_device(op, o.m2, out);
      check_shape(op, o.m2, out);
      check_dtype(op, o.m2, o.m);
    }
    const Mask mask(op, o.mask, out, state);
    const NextInput next(op, o.next, out, m_dtype);
    check_one_noise(op, o.seeds, o.noise, o.mask);
    StepArgs args{};
    args.state = state;
    args.seeds = check_seeds(op, o.seeds, out, batch);
    const uint32_t want = (o.x0 ? kWantX0 : 0u) | (o.s ? kWantS : 0u) | (o.mask ? kTermMask : 0u);
    bool draws = o.seeds.handle != nullptr;
    const auto check = [&](const double* values, int64_t number) { check_row(o, values, number, want); };
    if (const double* values = step_row<Backend>(op, o.table, o.index, row, out, kColumns, check, args.rows)) {
      std::copy_n(values, int{kColumns}, args.row);
      draws = draws && (step_terms(values, want) & (kReadsNoise | kTermKnownN));
    }
    for (const Operand* w : {&out, &o.x0, &o.s, &o.next}) {
      if (*w) {
        check_output(op, *w, {&o.x, &o.m, &o.m2, &o.h[0], &o.h[1], &o.h[2], &o.h[3], &o.noise, &mask.whole, &o.known},
                     {&o.table, &o.index, &o.seeds}, {&out, &o.x0, &o.s, &o.next});
      }
    }
    std::vector<const Operand*> operands{&out,    &o.x,     &o.m,        &o.m2,    &o.h[0], &o.h[1], &o.h[2],
                                         &o.h[3], &o.noise, &mask.whole, &o.known, &o.x0,   &o.s,    &o.next};
    args.space = make_space(op, out, operands, draws, Backend::kMaxChannels);
    args.x = make_view(args.space, o.x, state);
    args.u = make_view(args.space, o.m, m_dtype);
    if (doubled) {
      args.c = second_half(args.u, batch);
    } else {
      args.c = make_view(args.space, o.m2, m_dtype);
    }
    for (int k = 0; k < kHistories; ++k) args.h[k] = make_view(args.space, o.h[k], state);
    args.noise = make_view(args.space, o.noise, state);
    args.mask = make_view(args.space, mask.whole, mask.dtype);
    args.known = make_view(args.space, o.known, state);
    args.out = make_view(args.space, out, state);
    args.x0 = make_view(args.space, o.x0, state);
    args.s = make_view(args.space, o.s, state);
    args.next = make_view(args.space, o.next, next.dtype);
    if (next.doubled) args.next2 = second_half(args.next, batch);
    if (args.space.batch * args.space.count > 0) run(args, out, draws);
  }

  // Operands that most steps have come first: what a call in Python leaves out costs it nothing, and each None that it
  // gives a tenth of a microsecond or more.
  static std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor> step(
      MaybeTensor x, MaybeTensor m, Tensor table, int64_t row, bool want_x0, bool want_s, int64_t next_copies,
      std::optional<torch::headeronly::ScalarType> next_dtype, MaybeTensor m2, MaybeTensor h0, MaybeTensor h1,
      MaybeTensor h2, MaybeTensor h3, MaybeTensor index, MaybeTensor seeds, MaybeTensor noise, MaybeTensor mask,
      MaybeTensor known) {
    StepOperands o{{"x", x},
                   {"m", m},
                   {"m2", m2},
                   {{"h0", h0}, {"h1", h1}, {"h2", h2}, {"h3", h3}},
                   {"table", table},
                   {"index", index},
                   {"seeds", seeds},
                   {"noise", noise},
                   {"mask", mask},
                   {"known", known},
                   {},
                   {},
                   {},
                   {}};
    const Operand& like = state_like(o);
    check_batched("step", like);
    if (next_copies < 0 || next_copies > 2) fail("step", "next_copies must be 0, 1 or 2, got ", next_copies);
    Tensor out = empty_like(like, like.dtype);
    MaybeTensor x0, s, next;
    if (want_x0) x0 = empty_like(like, like.dtype);
    if (want_s) s = empty_like(like, like.dtype);
    if (next_copies > 0) {
      const int32_t dtype = next_dtype.has_value() ? static_cast<int32_t>(torch::stable::detail::from(*next_dtype))
                                                   : (o.m ? o.m.dtype : like.dtype);
      next = empty_like(like, dtype, next_copies);
    }
    o.out = {like.name, out};  // a rule that it breaks is broken by the operand it is made like
    o.x0 = {"x0", x0};
    o.s = {"s", s};
    o.next = {"next", next};
    step_into(o, row);
    return {out, x0, s, next};
  }

  static void step_out(MaybeTensor x, MaybeTensor m, Tensor table, int64_t row, Tensor out, MaybeTensor x0,
                       MaybeTensor s, MaybeTensor next, MaybeTensor m2, MaybeTensor h0, MaybeTensor h1, MaybeTensor h2,
                       MaybeTensor h3, MaybeTensor index, MaybeTensor seeds, MaybeTensor noise, MaybeTensor mask,
                       MaybeTensor known) {
    step_into({{"x", x},
               {"m", m},
               {"m2", m2},
               {{"h0", h0}, {"h1", h1}, {"h2", h2}, {"h3", h3}},
               {"table", table},
               {"index", index},
               {"seeds", seeds},
               {"noise", noise},
               {"mask", mask},
               {"known", known},
               {"out", out},
               {"x0", x0},
               {"s", s},
               {"next", next}},
              row);
  }

#define DK_FEW                                                                                                \
  "Tensor? m2=None, Tensor? h0=None, Tensor? h1=None, Tensor? h2=None, Tensor? h3=None, Tensor? index=None, " \
  "Tensor? seeds=None, Tensor? noise=None, Tensor? mask=None, Tensor? known=None"

  // `step_ad` is `step` with an autograd formula (diffkern/ops/_step.py): a formula costs microseconds a call even
  // where no gradient is wanted, so it has a name of its own.
  static void define(StableLibrary& m) {
    m.def(
        "step(Tensor? x, Tensor? m, Tensor table, SymInt row, bool want_x0=False, bool want_s=False, "
        "int next_copies=0, ScalarType? next_dtype=None, " DK_FEW ") -> (Tensor, Tensor?, Tensor?, Tensor?)");
    m.def(
        "step_ad(Tensor? x, Tensor? m, Tensor table, SymInt row, bool want_x0=False, bool want_s=False, "
        "int next_copies=0, ScalarType? next_dtype=None, " DK_FEW ") -> (Tensor, Tensor?, Tensor?, Tensor?)");
    m.def(
        "step_out(Tensor? x, Tensor? m, Tensor table, SymInt row, Tensor(a!) out, Tensor(b!)? x0=None, "
        "Tensor(c!)? s=None, Tensor(d!)? next=None, " DK_FEW ") -> ()");
  }

  static void implement(StableLibrary& m) {
    m.impl("step", TORCH_BOX(&StepOps::step));
    m.impl("step_ad", TORCH_BOX(&StepOps::step));
    m.impl("step_out", TORCH_BOX(&StepOps::step_out));
  }

#undef DK_FEW
};

}  // namespace dk::bind
