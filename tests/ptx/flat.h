// The argument PODs of csrc/core from flat arrays of int64, so that no other language has to know their layout.
// Used by launch.cu (the CUDA launchers, in the emulator) and cpu.cpp (their CPU twins).
#pragma once

#include <core/group_norm.h>
#include <core/learned_step.h>
#include <core/linear_rows.h>
#include <core/loss.h>
#include <core/moments.h>
#include <core/noise_sum.h>
#include <core/noising.h>
#include <core/quantile.h>
#include <core/randn.h>
#include <core/step.h>
#include <core/step_logprob.h>
#include <core/variational.h>

#include <initializer_list>

#define FLAT_PARAMETERS                                                                               \
  const int64_t *s, const int64_t *views, const int64_t *rows, const int64_t *seeds, uint64_t stream, \
      const int64_t *extra, const double *row
#define FLAT_ARGUMENTS s, views, rows, seeds, stream, extra, row

namespace flat {

constexpr int kViewWords = 3 + dk::kMaxDims;  // data, dtype, batch stride, strides

inline dk::Space space(const int64_t* v) {  // batch, count, layout, channels, dims, sizes
  dk::Space s{};
  s.batch = v[0];
  s.count = v[1];
  s.layout = static_cast<dk::Layout>(v[2]);
  s.channels = v[3];
  s.dims = static_cast<int32_t>(v[4]);
  for (int d = 0; d < dk::kMaxDims; ++d) s.size[d] = v[5 + d];
  return s;
}

inline dk::View view(const int64_t* views, int i) {
  const int64_t* v = views + i * kViewWords;
  dk::View w{};
  w.data = reinterpret_cast<void*>(v[0]);
  w.dtype = static_cast<dk::Dtype>(v[1]);
  w.batch_stride = v[2];
  for (int d = 0; d < dk::kMaxDims; ++d) w.stride[d] = v[3 + d];
  return w;
}

inline dk::Rows rows(const int64_t* v) {  // table, count, index, index stride, index is int32, first, step
  dk::Rows r{};
  r.table = reinterpret_cast<const double*>(v[0]);
  r.count = v[1];
  r.index = reinterpret_cast<const void*>(v[2]);
  r.index_stride = v[3];
  r.index_is_int32 = v[4] != 0;
  r.first = v[5];
  r.step = v[6];
  return r;
}

inline dk::Seeds seeds(const int64_t* v) { return {reinterpret_cast<const int64_t*>(v[0]), v[1]}; }

inline dk::RandnArgs randn(const int64_t* s, const int64_t* views, const int64_t*, const int64_t* key, uint64_t stream,
                           const int64_t*, const double*) {
  return {space(s), view(views, 0), seeds(key), stream};
}

// extra: number of terms, streams; row: weights
inline dk::NoiseSumArgs noise_sum(const int64_t* s, const int64_t* views, const int64_t*, const int64_t* key, uint64_t,
                                  const int64_t* extra, const double* row) {
  dk::NoiseSumArgs a{};
  a.space = space(s);
  a.out = view(views, 0);
  a.seeds = seeds(key);
  a.terms.n = static_cast<int32_t>(extra[0]);
  for (int j = 0; j < a.terms.n; ++j) {
    a.terms.stream[j] = static_cast<uint64_t>(extra[1 + j]);
    a.terms.weight[j] = row[j];
  }
  return a;
}

inline dk::NoisingArgs noising(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t* key,
                               uint64_t stream, const int64_t*, const double*) {
  dk::NoisingArgs a{};
  a.space = space(s);
  a.x0 = view(views, 0);
  a.noise = view(views, 1);
  a.out = view(views, 2);
  a.target = view(views, 3);
  a.eps = view(views, 4);
  a.rows = rows(r);
  a.seeds = seeds(key);
  a.stream = stream;
  return a;
}

inline dk::LossArgs loss(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t* key, uint64_t stream,
                         const int64_t* extra, const double*) {  // extra: reduction, partials, value, samples
  dk::LossArgs a{};
  a.space = space(s);
  a.pred = view(views, 0);
  a.x0 = view(views, 1);
  a.noise = view(views, 2);
  a.grad = view(views, 3);
  a.rows = rows(r);
  a.seeds = seeds(key);
  a.stream = stream;
  a.reduction = static_cast<dk::Reduction>(extra[0]);
  a.partials = reinterpret_cast<void*>(extra[1]);
  a.value = reinterpret_cast<void*>(extra[2]);
  a.samples = reinterpret_cast<void*>(extra[3]);
  return a;
}

inline dk::VariationalArgs variational(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t* key,
                                       uint64_t stream, const int64_t* extra, const double*) {
  dk::VariationalArgs a{};  // extra: reduction, partials, value, samples, means
  a.space = space(s);
  int i = 0;
  for (dk::View* v : {&a.pred, &a.w, &a.x0, &a.noise, &a.grad, &a.grad_w}) *v = view(views, i++);
  a.rows = rows(r);
  a.seeds = seeds(key);
  a.stream = stream;
  a.reduction = static_cast<dk::Reduction>(extra[0]);
  a.partials = reinterpret_cast<void*>(extra[1]);
  a.value = reinterpret_cast<void*>(extra[2]);
  a.samples = reinterpret_cast<void*>(extra[3]);
  a.means = reinterpret_cast<void*>(extra[4]);
  return a;
}

inline dk::StepArgs step(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t* key, uint64_t,
                         const int64_t* extra, const double* row) {  // extra: dtype of the state
  dk::StepArgs a{};
  a.space = space(s);
  int i = 0;
  for (dk::View* v : {&a.x, &a.u, &a.c, &a.h[0], &a.h[1], &a.h[2], &a.h[3], &a.noise, &a.mask, &a.known, &a.out, &a.x0,
                      &a.s, &a.next, &a.next2}) {
    *v = view(views, i++);
  }
  a.state = static_cast<dk::Dtype>(extra[0]);
  a.rows = rows(r);
  for (int k = 0; row != nullptr && k < dk::kColumns; ++k) a.row[k] = row[k];
  a.seeds = seeds(key);
  return a;
}

inline dk::QuantileArgs quantile(const int64_t* s, const int64_t* views, const int64_t*, const int64_t*, uint64_t,
                                 const int64_t* extra, const double* row) {  // extra: value, workspace; row: q, maximum
  dk::QuantileArgs a{};
  a.space = space(s);
  a.x = view(views, 0);
  a.out = view(views, 1);
  dk::set_ranks(a, row[0]);
  a.maximum = row[1];
  a.value = reinterpret_cast<void*>(extra[0]);
  a.workspace = reinterpret_cast<void*>(extra[1]);
  return a;
}

inline dk::MomentsArgs moments(const int64_t* s, const int64_t* views, const int64_t*, const int64_t*, uint64_t,
                               const int64_t* extra, const double*) {  // extra: value, partials
  dk::MomentsArgs a{};
  a.space = space(s);
  a.x = view(views, 0);
  a.value = reinterpret_cast<void*>(extra[0]);
  a.partials = reinterpret_cast<void*>(extra[1]);
  return a;
}

inline dk::ChannelView channels(const int64_t* v) {  // data, dtype, batch stride, stride
  return {reinterpret_cast<void*>(v[0]), static_cast<dk::Dtype>(v[1]), v[2], v[3]};
}

// s: batch, channels, positions, groups, channels_last, silu; extra: mean, rstd, partials, factors, sums, then weight,
// bias, scale, shift, add and their gradients; row: eps
inline dk::GroupNormArgs group_norm(const int64_t* s, const int64_t* views, const int64_t*, const int64_t*, uint64_t,
                                    const int64_t* extra, const double* row) {
  dk::GroupNormArgs a{};
  a.problem = {s[0], s[1], s[2], s[3], s[4] != 0, s[5] != 0, row[0]};
  a.x = view(views, 0);
  a.out = view(views, 1);
  a.grad_out = view(views, 2);
  a.mean = reinterpret_cast<void*>(extra[0]);
  a.rstd = reinterpret_cast<void*>(extra[1]);
  a.partials = reinterpret_cast<void*>(extra[2]);
  a.factors = reinterpret_cast<void*>(extra[3]);
  a.sums = reinterpret_cast<double*>(extra[4]);
  int i = 0;
  for (dk::ChannelView* v :
       {&a.weight, &a.bias, &a.scale, &a.shift, &a.add, &a.d_weight, &a.d_bias, &a.d_scale, &a.d_shift, &a.d_add}) {
    *v = channels(extra + 5 + 4 * i++);
  }
  return a;
}
inline dk::GroupNormArgs group_norm_grad(FLAT_PARAMETERS) { return group_norm(FLAT_ARGUMENTS); }

// s: rows, inputs, outputs, dtype, silu; extra: data and stride of x, weight, out and bias, prepared
inline dk::LinearRowsArgs linear_rows(const int64_t* s, const int64_t*, const int64_t*, const int64_t*, uint64_t,
                                      const int64_t* extra, const double*) {
  const auto at = [&](int i) { return reinterpret_cast<void*>(extra[i]); };
  dk::LinearRowsArgs a{s[0], s[1], s[2], static_cast<dk::Dtype>(s[3]), s[4] != 0, {}, {}, {}, nullptr, 0, nullptr};
  a.x = {at(0), extra[1]};
  a.weight = {at(2), extra[3]};
  a.out = {at(4), extra[5]};
  a.bias = at(6);
  a.bias_stride = extra[7];
  a.prepared = at(8);
  return a;
}

inline dk::LearnedStepArgs learned_step(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t* key,
                                        uint64_t, const int64_t* extra, const double* row) {  // extra: as step
  dk::LearnedStepArgs a{};
  a.space = space(s);
  int i = 0;
  for (dk::View* v : {&a.x, &a.m, &a.v, &a.noise, &a.mask, &a.known, &a.out, &a.x0, &a.next, &a.next2}) {
    *v = view(views, i++);
  }
  a.state = static_cast<dk::Dtype>(extra[0]);
  a.rows = rows(r);
  for (int k = 0; row != nullptr && k < dk::kLearnedColumns; ++k) a.row[k] = row[k];
  a.seeds = seeds(key);
  return a;
}

inline dk::StepLogprobArgs step_logprob(const int64_t* s, const int64_t* views, const int64_t* r, const int64_t*,
                                        uint64_t, const int64_t* extra, const double* row) {
  dk::StepLogprobArgs a{};  // extra: dtype of the state, learned, partials, value
  a.space = space(s);
  int i = 0;
  for (dk::View* v :
       {&a.after, &a.x, &a.u, &a.c, &a.v, &a.h[0], &a.h[1], &a.h[2], &a.h[3], &a.grad_u, &a.grad_c, &a.grad_v}) {
    *v = view(views, i++);
  }
  a.state = static_cast<dk::Dtype>(extra[0]);
  a.learned = extra[1] != 0;
  a.rows = rows(r);
  for (int k = 0; row != nullptr && k < dk::logprob_columns(a.learned); ++k) a.row[k] = row[k];
  a.partials = reinterpret_cast<void*>(extra[2]);
  a.value = reinterpret_cast<void*>(extra[3]);
  return a;
}

}  // namespace flat

// One C function an op, all with the same signature.
#define FLAT_OPS(OP)                                                                                       \
  OP(randn)                                                                                                \
  OP(noise_sum)                                                                                            \
  OP(noising) OP(loss) OP(variational) OP(step) OP(learned_step) OP(step_logprob) OP(quantile) OP(moments) \
      OP(group_norm) OP(group_norm_grad) OP(linear_rows)
