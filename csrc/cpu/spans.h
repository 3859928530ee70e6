// Bodies of the spans, one source for all instruction sets: each isa_*.cpp inlines them into functions that carry its
// target attribute, and g++ vectorises the loops for that target.
#pragma once

#include "../core/noising.h"
#include "../core/normal.h"
#include "../core/philox.h"
#include "isa.h"

#define DK_BODY inline __attribute__((always_inline))

namespace dk::cpu {

// Random words of one group of quads, word j of quad i at words[j][i]; its normals, lane j of quad i at lanes[j][i].
using Group = uint32_t[4][kQuadsAtOnce];
using Lanes = float[4][kQuadsAtOnce];

// The key of every Philox round, made once for a run of groups.
struct Keys {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  Keys(uint64_t seed) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, a += kPhiloxW0, b += kPhiloxW1) {
      k0[round] = a;
      k1[round] = b;
    }
  }
  uint64_t seed() const { return k0[0] | k1[0] << 32; }
};

// What an instruction set may do with intrinsics: Philox and the way from lanes to elements. Same bits as this one.
struct ScalarNoise {
  static void words(const Keys& keys, uint64_t stream, uint64_t q0, Group& out) {
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      const Words w = philox(keys.seed(), stream, q0 + static_cast<uint64_t>(i));
      for (int j = 0; j < 4; ++j) out[j][i] = w.r[j];
    }
  }
  static void interleave(const Lanes& lanes, float* out) {
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = lanes[j][i];
    }
  }
};

DK_BODY void normals_of_group(const Group& words, Lanes& lanes) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t *even = words[2 * half], *odd = words[2 * half + 1];
    float *first = lanes[2 * half], *second = lanes[2 * half + 1];
#pragma GCC ivdep
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      const Pair pair = normal_pair(even[i], odd[i]);
      first[i] = pair.a;
      second[i] = pair.b;
    }
  }
}

// The base of the step for one set of terms. With a constant `terms` the compiler drops what is not at work; without
// (kAll), every operand is loaded and every output stored, so that the tests become selects and the loop vectorises.
template <bool kAll, class T>
DK_BODY void base_loop(const StepSpan<T>& span, const T* m, const uint32_t terms) {
  const StepCoefficients<T> k = span.k;
  const T *x = span.x, *z = span.z;
  T *out = span.out, *x0 = span.x0, *s = span.s;
#pragma GCC ivdep
  for (int64_t i = 0; i < span.n; ++i) {
    const T x_i = kAll || (terms & (kTermP | kTermA | kTermSlopeA)) ? x[i] : T(0);
    const T m_i = kAll || (terms & (kTermQ | kTermD | kTermSlopeD)) ? m[i] : T(0);
    const T z_i = kAll || (terms & kTermR) ? z[i] : T(0);
    const StepBase<T> base = step_base(k, terms, x_i, m_i, z_i);
    out[i] = base.x;
    if (kAll || (terms & kWantX0)) x0[i] = base.x0;
    if (kAll || (terms & kWantS)) s[i] = base.s;
  }
}

// Every loop gives the same bits: it is the same formula.
template <class T>
DK_BODY void base_body(const StepSpan<T>& span, const T* m, uint32_t terms) {
  switch (terms) {
#define DK_CASE(TERMS) \
  case TERMS:          \
    return base_loop<false>(span, m, TERMS);
    DK_FOR_BASE_LOOPS(DK_CASE)
#undef DK_CASE
    default:
      return base_loop<true>(span, m, terms);
  }
}

// out += c[0] term[0] + ... + c[kTerms - 1] term[kTerms - 1], a rounding each, in one pass over out.
template <int kTerms, class T>
DK_BODY void add_terms(const T* c, const T* const* term, T* out, int64_t n) {
  T by[kTerms];
  const T* in[kTerms];
  for (int j = 0; j < kTerms; ++j) by[j] = c[j], in[j] = term[j];
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = out[i];
    for (int j = 0; j < kTerms; ++j) sum = fma(by[j], in[j][i], sum);
    out[i] = sum;
  }
}

// The histories and the noise that are at work, in the order of step_element.
template <class T>
DK_BODY void add_later_terms(const StepSpan<T>& span) {
  T c[kHistories + 1];
  const T* term[kHistories + 1];
  int count = 0;
  for (int j = 0; j < kHistories; ++j) {
    if (span.terms & (kTermE0 << j)) c[count] = span.k.e[j], term[count++] = span.h[j];
  }
  if (span.terms & kTermG) c[count] = span.k.g, term[count++] = span.z;
  switch (count) {
    case 1:
      return add_terms<1>(c, term, span.out, span.n);
    case 2:
      return add_terms<2>(c, term, span.out, span.n);
    case 3:
      return add_terms<3>(c, term, span.out, span.n);
    case 4:
      return add_terms<4>(c, term, span.out, span.n);
    case 5:
      return add_terms<5>(c, term, span.out, span.n);
    default:
      return;
  }
}

// The stages of the step one after the other over a span that stays in the L1 cache.
template <class T>
DK_BODY void step_body(const StepSpan<T>& span) {
  const uint32_t terms = span.terms;
  const StepCoefficients<T> k = span.k;
  const int64_t n = span.n;
  T* out = span.out;
  const T* m = span.u;
  if (terms & kTermW) {
    T* to = span.guided;
    const T *u = span.u, *c = span.c;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = guided(k.w, u[i], c[i]);
    m = to;
  }
  base_body(span, m, terms & kBaseTerms);
  add_later_terms(span);
  if (terms & kTermMask) {
    const T *mask = span.mask, *known = span.known, *z2 = span.z2;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = step_masked(k, terms, out[i], mask[i], known[i], z2[i]);
  }
  if (terms & kWantNext) {
    T* next = span.next;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) next[i] = mul(k.next, out[i]);
  }
}

template <class T>
DK_BODY void learned_body(const LearnedSpan<T>& span) {
  const LearnedSpan<T> s = span;
#pragma GCC ivdep
  for (int64_t i = 0; i < s.n; ++i) s.out[i] = learned_noise(s.k, s.v[i], s.z[i]);
}

template <class T>
DK_BODY void affine_loop(T a, const T* x0, T b, const T* z, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = affine(a, x0[i], b, z[i]);
}

template <class T>
DK_BODY void noising_body(const NoisingSpan<T>& span) {
  // The target first: x_t may be written over x0.
  if (span.target != nullptr) affine_loop(span.k.u, span.x0, span.k.v, span.z, span.target, span.n);
  if (span.out != nullptr) affine_loop(span.k.s, span.x0, span.k.n, span.z, span.out, span.n);
}

template <class T>
DK_BODY T loss_element(const LossSpan<T>& span, const LossCoefficients<T>& k, int64_t i) {
  const T difference = sub(span.pred[i], affine(k.u, span.x0[i], k.v, span.z[i]));
  if (span.grad != nullptr) span.grad[i] = mul(k.gradient, difference);
  return mul(difference, difference);
}

// The sum of `width` values, a power of two, in the order of core/ordered_sum.h.
template <class T>
DK_BODY T fold(T* values, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) values[i] = add(values[i], values[i + half]);
  }
  return values[0];
}

template <class T>
DK_BODY T loss_body(const LossSpan<T>& span) {
  const LossCoefficients<T> k = span.k;
  T* squares = span.squares;
  int64_t width = kSumBlock;
  if (span.n == kSumBlock) {  // the first two folds at once, without storing what they fold
    width = kSumBlock / 4;
    const LossSpan<T> s = span;
    if (s.grad != nullptr) {
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const T even = add(loss_element(s, k, i), loss_element(s, k, i + 2 * width));
        const T odd = add(loss_element(s, k, i + width), loss_element(s, k, i + 3 * width));
        squares[i] = add(even, odd);
      }
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const T even = add(loss_element(s, k, i), loss_element(s, k, i + 2 * width));
        const T odd = add(loss_element(s, k, i + width), loss_element(s, k, i + 3 * width));
        squares[i] = add(even, odd);
      }
    }
  } else {
    for (int64_t i = 0; i < span.n; ++i) squares[i] = loss_element(span, k, i);
    for (int64_t i = span.n; i < width; ++i) squares[i] = T(0);
  }
  return fold(squares, width);
}

template <bool decodes, class T>
DK_BODY void variational_loop(const VariationalSpan<T>& span) {
  const VariationalSpan<T> s = span;
#pragma GCC ivdep
  for (int64_t i = 0; i < s.n; ++i) {
    const auto element = variational_element<decodes>(s.k, s.pred[i], s.w[i], s.x0[i], s.z[i]);
    s.squares[i] = element.square;
    s.nats[i] = element.nats;
    s.grad[i] = element.by_pred;
    s.grad_w[i] = element.by_w;
  }
}

template <class T>
DK_BODY VariationalSums<T> variational_body(const VariationalSpan<T>& span) {
  span.k.decodes ? variational_loop<true>(span) : variational_loop<false>(span);
  for (int64_t i = span.n; i < kSumBlock; ++i) span.squares[i] = span.nats[i] = T(0);
  return {fold(span.squares, kSumBlock), fold(span.nats, kSumBlock)};
}

template <bool learned, bool wants, class T>
DK_BODY void logprob_loop(const LogprobSpan<T>& span) {
  const LogprobSpan<T> s = span;
  const T* mean = s.mean.out;
#pragma GCC ivdep
  for (int64_t i = 0; i < s.mean.n; ++i) {
    const auto element = logprob_element<learned>(s.row, s.after[i], mean[i], s.x0[i], s.v[i]);
    s.energies[i] = element.energy;
    if (wants) s.grad_u[i] = element.by_m;
    if (wants && learned) s.grad_v[i] = element.by_v;
  }
}

template <class T>
DK_BODY T step_logprob_body(const LogprobSpan<T>& span) {
  step_body(span.mean);
  if (span.learned) {
    span.wants ? logprob_loop<true, true>(span) : logprob_loop<true, false>(span);
  } else {
    span.wants ? logprob_loop<false, true>(span) : logprob_loop<false, false>(span);
  }
  const int64_t n = span.mean.n;
  if (span.wants && span.splits) {
    const LogprobRow<T> row = span.row;
    T *grad_u = span.grad_u, *grad_c = span.grad_c;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const GuidedGradient<T> parts = guided_gradient(row, grad_u[i]);
      grad_u[i] = parts.u;
      grad_c[i] = parts.c;
    }
  }
  for (int64_t i = n; i < kSumBlock; ++i) span.energies[i] = T(0);
  return fold(span.energies, kSumBlock);
}

DK_BODY void widen_bf16_body(const Bfloat16* in, float* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}

DK_BODY void narrow_bf16_body(const float* in, Bfloat16* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = narrow_bf16(in[i]);
}

}  // namespace dk::cpu

// Defines the functions of one table: TARGET attribute, NOISE (as ScalarNoise), widen and narrow
// f16.
#define DK_DEFINE_ISA(VARIABLE, TARGET, NOISE, WIDEN_F16, NARROW_F16)                                                  \
  namespace dk::cpu {                                                                                                  \
  namespace {                                                                                                          \
  TARGET void normals_span(uint64_t seed, uint64_t stream, uint64_t q0, int64_t quads, float* out) {                   \
    const Keys keys(seed);                                                                                             \
    for (int64_t done = 0; done < quads; done += kQuadsAtOnce) {                                                       \
      Group words;                                                                                                     \
      Lanes lanes;                                                                                                     \
      NOISE::words(keys, stream, q0 + static_cast<uint64_t>(done), words);                                             \
      normals_of_group(words, lanes);                                                                                  \
      NOISE::interleave(lanes, out + 4 * done);                                                                        \
    }                                                                                                                  \
  }                                                                                                                    \
  TARGET void step_f32(const StepSpan<float>& span) { step_body(span); }                                               \
  TARGET void step_f64(const StepSpan<double>& span) { step_body(span); }                                              \
  TARGET void learned_f32(const LearnedSpan<float>& span) { learned_body(span); }                                      \
  TARGET void learned_f64(const LearnedSpan<double>& span) { learned_body(span); }                                     \
  TARGET void noising_f32(const NoisingSpan<float>& span) { noising_body(span); }                                      \
  TARGET void noising_f64(const NoisingSpan<double>& span) { noising_body(span); }                                     \
  TARGET float loss_f32(const LossSpan<float>& span) { return loss_body(span); }                                       \
  TARGET double loss_f64(const LossSpan<double>& span) { return loss_body(span); }                                     \
  TARGET VariationalSums<float> variational_f32(const VariationalSpan<float>& span) { return variational_body(span); } \
  TARGET VariationalSums<double> variational_f64(const VariationalSpan<double>& span) {                                \
    return variational_body(span);                                                                                     \
  }                                                                                                                    \
  TARGET float step_logprob_f32(const LogprobSpan<float>& span) { return step_logprob_body(span); }                    \
  TARGET double step_logprob_f64(const LogprobSpan<double>& span) { return step_logprob_body(span); }                  \
  TARGET void widen_bf16_span(const Bfloat16* in, float* out, int64_t n) { widen_bf16_body(in, out, n); }              \
  TARGET void narrow_bf16_span(const float* in, Bfloat16* out, int64_t n) { narrow_bf16_body(in, out, n); }            \
  }                                                                                                                    \
  const Isa VARIABLE{normals_span,     step_f32,  step_f64,   learned_f32,     learned_f64,     noising_f32,           \
                     noising_f64,      loss_f32,  loss_f64,   variational_f32, variational_f64, step_logprob_f32,      \
                     step_logprob_f64, WIDEN_F16, NARROW_F16, widen_bf16_span, narrow_bf16_span};                      \
  }
