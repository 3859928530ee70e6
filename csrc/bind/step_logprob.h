// The op `step_logprob`.
#pragma once

#include <algorithm>

#include "../core/step_logprob.h"
#include "memory.h"
#include "rows.h"
#include "step_checks.h"

namespace dk::bind {

template <class Backend>
struct StepLogprobOps {
  static constexpr const char* op = "step_logprob";

  static void run(const StepLogprobArgs& args, const Operand& where) {
    if constexpr (Backend::kHost) {
      Backend::run(cpu::step_logprob, args, Backend::grain(false));
      cpu::step_logprob_finish(args);
    } else {
      Backend::launch(op, cuda::step_logprob, args, where);
    }
  }

  struct Operands {
    Operand after, x, m, m2, h[kHistories], table, index;
    bool learned, doubled;  // m holds a variance beside the mean; two predictions
  };

  // Host rows: a Gaussian, and every operand that its mean reads is there.
  static void check_row(const Operands& o, const double* row, int64_t number) {
    check_row_finite(op, row, logprob_columns(o.learned), number);
    check_clip(op, row[kClip], number);
    if (row[kR] != 0) fail(op, "r must be 0 (x0 must hold no noise), got ", row[kR], " in row ", number);
    if (std::isinf(row[kG])) fail(op, "g must be finite, got ", row[kG], " in row ", number);
    if (o.learned) check_learned_row(op, row, number);
    const uint32_t terms = row[kG] != 0 ? step_terms(row, 0) : 0;
    need(op, o.x, terms & kTermP, "p", row[kP]);
    need(op, o.x, terms & kTermA, "a", row[kA]);
    need(op, o.m, terms & kTermQ, "q", row[kQ]);
    need(op, o.m, terms & kTermD, "d", row[kD]);
    need(op, o.m, o.learned && row[kG] != 0 && row[kLogVariance1] != 0, "r1", o.learned ? row[kLogVariance1] : 0.0);
    if ((terms & kTermW) && !o.m2 && !o.doubled && o.after.sizes[0] > 0) {
      fail(op, "m must hold two predictions for guidance (a doubled batch [uncond | cond], or m2): the row has w = ",
           row[kW]);
    }
    static const char* const kColumn[kHistories] = {"e0", "e1", "e2", "e3"};
    for (int k = 0; k < kHistories; ++k) need(op, o.h[k], terms & (kTermE0 << k), kColumn[k], row[kE0 + k]);
  }

  static void check_prediction(const Operands& o) {
    const Operand &m = o.m, &after = o.after;
    if (o.m2 && !m) fail(op, "m must be given with m2, got None");
    if (o.learned) {
      if (o.m2) fail(op, "m2 must not be given where the variance is learned, got ", shape_text(o.m2));
      check_learned_prediction(op, m, after);
    } else {
      check_shape(op, m, after, o.doubled ? 2 : 1);
    }
    check_same_device(op, m, after);
    if (!o.m2) return;
    check_same_device(op, o.m2, after);
    check_shape(op, o.m2, after);
    check_dtype(op, o.m2, m);
  }

  static bool is_learned(const Operand& table) {
    const bool learned = table.dims == 2 && table.sizes[1] == kLearnedColumns;
    if (!learned && (table.dims != 2 || table.sizes[1] != kColumns)) {
      fail(op, "table must have shape [rows, ", int(kColumns), "], or [rows, ", int(kLearnedColumns),
           "] for a learned variance, got ", shape_text(table));
    }
    return learned;
  }

  static std::tuple<Tensor, MaybeTensor, MaybeTensor> step_logprob(Tensor after, MaybeTensor x, MaybeTensor m,
                                                                   MaybeTensor m2, MaybeTensor h0, MaybeTensor h1,
                                                                   MaybeTensor h2, MaybeTensor h3, Tensor table,
                                                                   int64_t row, MaybeTensor index, bool want_grad) {
    Operands o{
        {"after", after}, {"x", x},         {"m", m}, {"m2", m2}, {{"h0", h0}, {"h1", h1}, {"h2", h2}, {"h3", h3}},
        {"table", table}, {"index", index}, false,    false};
    const Operand& like = o.after;
    check_batched(op, like);
    Backend::check(op, like);
    const Dtype state = float_dtype(op, like);
    for (const Operand* same : {&o.x, &o.h[0], &o.h[1], &o.h[2], &o.h[3]}) {
      check_same_device(op, *same, like);
      check_dtype(op, *same, like);
      check_shape(op, *same, like);
    }
    const int64_t batch = like.sizes[0];
    o.learned = is_learned(o.table);
    o.doubled = !o.learned && o.m && !o.m2 && o.m.dims > 0 && o.m.sizes[0] == 2 * batch && batch > 0;
    check_prediction(o);
    if (want_grad && !o.m) fail(op, "m must be given where a gradient is asked for, got None");
    const Dtype m_dtype = o.m ? float_dtype(op, o.m) : state;
    StepLogprobArgs args{};
    args.state = state;
    args.learned = o.learned;
    const int64_t columns = logprob_columns(o.learned);
    const auto check = [&](const double* values, int64_t number) { check_row(o, values, number); };
    if (const double* values = step_row<Backend>(op, o.table, o.index, row, like, columns, check, args.rows)) {
      std::copy_n(values, columns, args.row);
    }

    MaybeTensor grad, grad2;
    if (want_grad) grad = empty_like(o.m, o.m.dtype);
    if (want_grad && o.m2) grad2 = empty_like(o.m2, o.m2.dtype);
    const int64_t channels = like.dims > 1 ? like.sizes[1] : 1;
    const Operand second_grad("grad2", grad2);
    const Halves ms(op, o.m, channels, o.learned), grads(op, {"grad", grad}, channels, o.learned);
    args.space = make_space(op, like,
                            {&like, &o.x, &ms.first, &ms.second, &o.m2, &o.h[0], &o.h[1], &o.h[2], &o.h[3],
                             &grads.first, &grads.second, &second_grad},
                            false, Backend::kMaxChannels);
    args.after = make_view(args.space, like, state);
    args.x = make_view(args.space, o.x, state);
    args.u = make_view(args.space, ms.first, m_dtype);
    args.v = make_view(args.space, ms.second, m_dtype);
    args.c = make_view(args.space, o.m2, m_dtype);
    for (int k = 0; k < kHistories; ++k) args.h[k] = make_view(args.space, o.h[k], state);
    args.grad_u = make_view(args.space, grads.first, m_dtype);
    args.grad_v = make_view(args.space, grads.second, m_dtype);
    args.grad_c = make_view(args.space, second_grad, m_dtype);
    if (o.doubled) {
      args.c = second_half(args.u, batch);
      if (want_grad) args.grad_c = second_half(args.grad_u, batch);
    }
    const int32_t sums = sum_dtype(state);
    const int64_t blocks = sum_blocks(args.space.count);
    Tensor value = new_empty(like, {batch}, sums), partials = new_empty(like, {batch, blocks}, sums);
    args.value = value.mutable_data_ptr();
    args.partials = partials.mutable_data_ptr();
    run(args, like);
    return {value, grad, grad2};
  }

  static void define(StableLibrary& m) {
    m.def(
        "step_logprob(Tensor after, Tensor? x, Tensor? m, Tensor? m2, Tensor? h0, Tensor? h1, Tensor? h2, Tensor? h3, "
        "Tensor table, SymInt row, Tensor? index, bool want_grad) -> (Tensor, Tensor?, Tensor?)");
  }

  static void implement(StableLibrary& m) { m.impl("step_logprob", TORCH_BOX(&StepLogprobOps::step_logprob)); }
};

}  // namespace dk::bind
