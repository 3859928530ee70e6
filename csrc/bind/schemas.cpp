// The schemas of all ops: the order and the types of the functions in ops.h and attention.h. The boxing layer compares
// only the number of arguments, so tests/ops/test_schemas.py calls every op with all arguments distinct.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(diffkern, m) {
  m.def("randn(SymInt[] size, Tensor seeds, SymInt stream, ScalarType dtype) -> Tensor");
  m.def("randn_out(Tensor seeds, SymInt stream, Tensor(a!) out) -> ()");
  m.def(
      "noising(Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, bool want_target, "
      "bool want_eps) -> (Tensor, Tensor?, Tensor?)");
  m.def(
      "noising_out(Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
      "Tensor(a!) out, Tensor(b!)? target, Tensor(c!)? eps) -> ()");
  m.def(
      "loss(Tensor pred, Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
      "int reduction, bool want_grad) -> (Tensor, Tensor?)");
  // csrc/bind/noise_sum.h
  m.def("noise_sum(SymInt[] size, Tensor seeds, Tensor streams, Tensor weights, ScalarType dtype) -> Tensor");
  m.def("noise_sum_out(Tensor seeds, Tensor streams, Tensor weights, Tensor(a!) out) -> ()");
  // csrc/bind/variational.h
  m.def(
      "variational(Tensor pred, Tensor x0, Tensor table, Tensor? index, Tensor? seeds, SymInt stream, Tensor? noise, "
      "int reduction, bool want_grad) -> (Tensor, Tensor, Tensor?)");
  m.def(
      "step(Tensor? x, Tensor? m, Tensor? m2, Tensor? h0, Tensor? h1, Tensor? h2, Tensor? h3, Tensor table, SymInt "
      "row, "
      "Tensor? index, Tensor? seeds, Tensor? noise, Tensor? mask, Tensor? known, bool want_x0, bool want_s, "
      "int next_copies, ScalarType? next_dtype) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  // `step` with an autograd formula (diffkern/ops/_step.py): a formula costs microseconds a call even where no gradient
  // is wanted, so it has a name of its own.
  m.def(
      "step_ad(Tensor? x, Tensor? m, Tensor? m2, Tensor? h0, Tensor? h1, Tensor? h2, Tensor? h3, Tensor table, "
      "SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, Tensor? mask, Tensor? known, bool want_x0, bool "
      "want_s, "
      "int next_copies, ScalarType? next_dtype) -> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def(
      "step_out(Tensor? x, Tensor? m, Tensor? m2, Tensor? h0, Tensor? h1, Tensor? h2, Tensor? h3, Tensor table, "
      "SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, Tensor? mask, Tensor? known, Tensor(a!) out, "
      "Tensor(b!)? x0, Tensor(c!)? s, Tensor(d!)? next) -> ()");
  // csrc/bind/statistics.h
  m.def("quantile(Tensor x, float q) -> Tensor");
  m.def("dynamic_threshold(Tensor x0, float q, float maximum) -> Tensor");
  m.def("dynamic_threshold_out(Tensor x0, float q, float maximum, Tensor(a!) out) -> ()");
  m.def("moments(Tensor x) -> Tensor");
  // csrc/bind/learned_step.h
  m.def(
      "learned_step(Tensor x, Tensor? m, Tensor table, SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, "
      "Tensor? mask, Tensor? known, bool want_x0, int next_copies, ScalarType? next_dtype) -> "
      "(Tensor, Tensor?, Tensor?)");
  m.def(
      "learned_step_out(Tensor x, Tensor? m, Tensor table, SymInt row, Tensor? index, Tensor? seeds, Tensor? noise, "
      "Tensor? mask, Tensor? known, Tensor(a!) out, Tensor(b!)? x0, Tensor(c!)? next) -> ()");
  // csrc/bind/step_logprob.h
  m.def(
      "step_logprob(Tensor after, Tensor? x, Tensor? m, Tensor? m2, Tensor? h0, Tensor? h1, Tensor? h2, Tensor? h3, "
      "Tensor table, SymInt row, Tensor? index, bool want_grad) -> (Tensor, Tensor?, Tensor?)");
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_grad(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("spatial_attention(Tensor qkv, int heads, int order, float scale) -> (Tensor, Tensor)");
  m.def(
      "spatial_attention_grad(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int heads, int order, float scale) "
      "-> Tensor");
}
