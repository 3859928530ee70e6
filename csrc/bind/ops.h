// The ops over a backend (CPU or CUDA): check, describe, run. A backend gives
//   static constexpr bool kHost            tables and indices are read here, not on the device
//   static constexpr int64_t kMaxChannels  largest C with a channels_last path that draws noise
//   static void check(const char* op, const Operand&)        is this its device?
//   static void randn / noising / step / loss(const Args&, const Operand& where, bool draws)
//
// Schemas of the functions below stand next to them in the same order in schemas.cpp.
#pragma once

#include "../core/loss.h"
#include "../core/noising.h"
#include "../core/randn.h"
#include "step_checks.h"

namespace dk::bind {

template <class Backend>
struct Ops {
  // ------------------------------------------------------------------------------------------------- randn
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
    if (args.space.batch * args.space.count > 0) Backend::randn(args, out);
  }

  static void randn_out(Tensor seeds, int64_t stream, Tensor out) {
    randn_into("randn", {"seeds", seeds}, stream, {"out", out});
  }

  static Tensor randn(std::vector<int64_t> size, Tensor seeds, int64_t stream, torch::headeronly::ScalarType dtype) {
    const Operand s("seeds", seeds);
    if (size.empty()) fail("randn", "size must have a batch dimension, got []");
    for (const int64_t n : size) {
      if (n < 0)
        fail("randn", "size must not be negative, got ", shape_text(size.data(), static_cast<int64_t>(size.size())));
    }
    const int32_t code = static_cast<int32_t>(torch::stable::detail::from(dtype));
    check_seeds("randn", s, s, size[0]);
    Tensor out = new_empty(s, size, code);
    randn_into("randn", s, stream, {"out", out});
    return out;
  }

  // ----------------------------------------------------------------------------------------- noising and loss
  // The rows of a noising or loss table: by index, or row b of [B] rows, or one row for all.
  static Rows table_rows(const char* op, const Operand& table, const Operand& index, const Operand& first,
                         int64_t columns) {
    check_same_device(op, table, first);
    check_same_device(op, index, first);
    const int64_t batch = first.sizes[0];
    Rows rows{};
    rows.table = check_table(op, table, columns);
    rows.count = table.sizes[0];
    if (index) {
      check_index(op, index, batch, rows, Backend::kHost);
    } else {
      if (rows.count != 1 && rows.count != batch) {
        fail(op, "table must have 1 row or one a sample (", batch, ") when no index is given, got ", rows.count);
      }
      rows.step = rows.count == 1 ? 0 : 1;
    }
    if (Backend::kHost) {
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t r = row_number(rows, b);
        check_row_finite(op, rows.table + r * columns, columns, r);
      }
    }
    return rows;
  }

  static void check_noise_source(const char* op, const Operand& seeds, const Operand& noise) {
    if (seeds && noise) fail(op, "give either seeds (noise by address) or noise (a tensor), got both");
    if (!seeds && !noise) fail(op, "seeds (noise by address) or noise (a tensor) must be given, got neither");
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
    args.rows = table_rows(op, table, index, x0, kNoisingColumns);
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
    if (args.space.batch * args.space.count > 0) Backend::noising(args, x0);
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

  static std::tuple<Tensor, MaybeTensor> loss(Tensor pred_tensor, Tensor x0_tensor, Tensor table_tensor,
                                              MaybeTensor index_tensor, MaybeTensor seeds_tensor, int64_t stream,
                                              MaybeTensor noise_tensor, int64_t reduction, bool want_grad) {
    const char* op = "loss";
    const Operand pred("pred", pred_tensor), x0("x0", x0_tensor), table("table", table_tensor),
        index("index", index_tensor), seeds("seeds", seeds_tensor), noise("noise", noise_tensor);
    check_batched(op, x0);
    Backend::check(op, x0);
    const Dtype dtype = float_dtype(op, x0), pred_dtype = float_dtype(op, pred);
    check_same_device(op, pred, x0);
    check_shape(op, pred, x0);
    check_same_device(op, noise, x0);
    check_shape(op, noise, x0);
    check_dtype(op, noise, x0);
    check_noise_source(op, seeds, noise);
    if (reduction < 0 || reduction > 2) fail(op, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ", reduction);

    LossArgs args{};
    args.reduction = static_cast<Reduction>(reduction);
    args.rows = table_rows(op, table, index, x0, kLossColumns);
    args.seeds = check_seeds(op, seeds, x0, x0.sizes[0]);
    args.stream = check_stream(op, stream);
    const int64_t batch = x0.sizes[0];
    const int32_t sum_dtype = dtype == Dtype::f64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    MaybeTensor grad;
    if (want_grad) grad = empty_like(pred, pred.dtype);
    const Operand grad_operand("grad", grad);
    Tensor value = args.reduction == Reduction::none ? new_empty(x0, {batch}, sum_dtype) : new_empty(x0, {}, sum_dtype);
    args.space =
        make_space(op, x0, {&x0, &pred, &noise, &grad_operand}, seeds.handle != nullptr, Backend::kMaxChannels);
    args.x0 = make_view(args.space, x0, dtype);
    args.pred = make_view(args.space, pred, pred_dtype);
    args.noise = make_view(args.space, noise, dtype);
    args.grad = make_view(args.space, grad_operand, pred_dtype);
    const int64_t blocks = sum_blocks(args.space.count);
    Tensor partials = new_empty(x0, {batch, blocks}, sum_dtype), samples = new_empty(x0, {batch}, sum_dtype);
    args.partials = partials.mutable_data_ptr();
    args.samples = samples.mutable_data_ptr();
    args.value = value.mutable_data_ptr();
    Backend::loss(args, x0);  // an empty sample has loss NaN, as torch's mean of nothing
    return {value, grad};
  }

  // -------------------------------------------------------------------------------------------------- step
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
    const Dtype mask_dtype = check_mask(op, o.mask, out, state);
    const NextInput next(op, o.next, out, m_dtype);
    check_one_noise(op, o.seeds, o.noise, o.mask);
    StepArgs args{};
    args.state = state;
    args.seeds = check_seeds(op, o.seeds, out, batch);
    const double* table = check_table(op, o.table, kColumns);
    const int64_t rows = o.table.sizes[0];
    const bool host_table = o.table.device_type == aoti_torch_device_type_cpu();
    uint32_t want = (o.x0 ? kWantX0 : 0u) | (o.s ? kWantS : 0u) | (o.mask ? kTermMask : 0u);
    if (!o.index && (row < 0 || row >= rows))
      fail(op, "row must be in [0, ", rows, "), the rows of the table, got ", row);
    args.rows.count = rows;
    args.rows.first = row;
    bool draws = o.seeds.handle != nullptr;
    if (host_table && !o.index) {
      const double* values = table + row * kColumns;
      check_row(o, values, row, want);
      for (int k = 0; k < kColumns; ++k) args.row[k] = values[k];
      const uint32_t terms = step_terms(values, want);
      draws = draws && (terms & (kReadsNoise | kTermKnownN));
    } else {
      check_same_device(op, o.table, out);
      args.rows.table = table;
      if (o.index) {
        check_same_device(op, o.index, out);
        check_index(op, o.index, batch, args.rows, Backend::kHost);
        if (Backend::kHost) {
          for (int64_t b = 0; b < (o.index.dims == 1 ? batch : 1); ++b) {
            const int64_t r = row_number(args.rows, b);
            check_row(o, table + r * kColumns, r, want);
          }
        }
      }
    }
    for (const Operand* w : {&out, &o.x0, &o.s, &o.next}) {
      if (*w) {
        check_output(op, *w, {&o.x, &o.m, &o.m2, &o.h[0], &o.h[1], &o.h[2], &o.h[3], &o.noise, &o.mask, &o.known},
                     {&o.table, &o.index, &o.seeds}, {&out, &o.x0, &o.s, &o.next});
      }
    }
    std::vector<const Operand*> operands{&out,    &o.x,     &o.m,    &o.m2,    &o.h[0], &o.h[1], &o.h[2],
                                         &o.h[3], &o.noise, &o.mask, &o.known, &o.x0,   &o.s,    &o.next};
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
    args.mask = make_view(args.space, o.mask, mask_dtype);
    args.known = make_view(args.space, o.known, state);
    args.out = make_view(args.space, out, state);
    args.x0 = make_view(args.space, o.x0, state);
    args.s = make_view(args.space, o.s, state);
    args.next = make_view(args.space, o.next, next.dtype);
    if (next.doubled) args.next2 = second_half(args.next, batch);
    if (args.space.batch * args.space.count > 0) Backend::step(args, out, draws);
  }

  static std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor> step(
      MaybeTensor x, MaybeTensor m, MaybeTensor m2, MaybeTensor h0, MaybeTensor h1, MaybeTensor h2, MaybeTensor h3,
      Tensor table, int64_t row, MaybeTensor index, MaybeTensor seeds, MaybeTensor noise, MaybeTensor mask,
      MaybeTensor known, bool want_x0, bool want_s, int64_t next_copies,
      std::optional<torch::headeronly::ScalarType> next_dtype) {
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

  static void step_out(MaybeTensor x, MaybeTensor m, MaybeTensor m2, MaybeTensor h0, MaybeTensor h1, MaybeTensor h2,
                       MaybeTensor h3, Tensor table, int64_t row, MaybeTensor index, MaybeTensor seeds,
                       MaybeTensor noise, MaybeTensor mask, MaybeTensor known, Tensor out, MaybeTensor x0,
                       MaybeTensor s, MaybeTensor next) {
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

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("randn", TORCH_BOX(&Ops::randn));
    m.impl("randn_out", TORCH_BOX(&Ops::randn_out));
    m.impl("noising", TORCH_BOX(&Ops::noising));
    m.impl("noising_out", TORCH_BOX(&Ops::noising_out));
    m.impl("loss", TORCH_BOX(&Ops::loss));
    m.impl("step", TORCH_BOX(&Ops::step));
    m.impl("step_ad", TORCH_BOX(&Ops::step));
    m.impl("step_out", TORCH_BOX(&Ops::step_out));
  }
};

}  // namespace dk::bind
