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
struct PortableNoise {
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

// The same loop for every set of terms. With a constant `terms` the compiler drops what is not at work; without
// (kAll), every operand is loaded and every output stored, so that the tests become selects and the loop vectorises.
template <bool kAll, class T>
DK_BODY void step_loop(const StepSpan<T>& span, const uint32_t terms) {
  const StepCoefficients<T> k = span.k;
  const T *x = span.x, *u = span.u, *c = span.c, *z = span.z, *z2 = span.z2, *mask = span.mask, *known = span.known;
  const T *h0 = span.h[0], *h1 = span.h[1], *h2 = span.h[2], *h3 = span.h[3];
  T *out = span.out, *x0 = span.x0, *s = span.s, *next = span.next;
#pragma GCC ivdep
  for (int64_t i = 0; i < span.n; ++i) {
    StepInputs<T> in{};
    if (kAll || (terms & (kTermP | kTermA | kTermSlopeA))) in.x = x[i];
    if (kAll || (terms & (kTermQ | kTermD | kTermSlopeD))) in.u = u[i];
    if (kAll || (terms & kTermW)) in.c = c[i];
    if (kAll || (terms & (kTermE0 << 0))) in.h[0] = h0[i];
    if (kAll || (terms & (kTermE0 << 1))) in.h[1] = h1[i];
    if (kAll || (terms & (kTermE0 << 2))) in.h[2] = h2[i];
    if (kAll || (terms & (kTermE0 << 3))) in.h[3] = h3[i];
    if (kAll || (terms & kReadsNoise)) in.z = z[i];
    if (kAll || (terms & kTermMask)) in.mask = mask[i];
    if (kAll || (terms & kTermKnownS)) in.known = known[i];
    if (kAll || (terms & kTermKnownN)) in.z2 = z2[i];
    const StepOutputs<T> o = step_element(k, terms, in);
    out[i] = o.x;
    if (kAll || (terms & kWantX0)) x0[i] = o.x0;
    if (kAll || (terms & kWantS)) s[i] = o.s;
    if (kAll || (terms & kWantNext)) next[i] = o.next;
  }
}

constexpr uint32_t kX0 = kTermP | kTermQ;
constexpr uint32_t kFromEps = kX0 | kTermB | kTermD;             // x' = b x0 + d eps
constexpr uint32_t kFromX0 = kX0 | kTermA | kTermB;              // x' = a x + b x0
constexpr uint32_t kFromSlope = kTermA | kTermD;                 // x' = a x + d m
constexpr uint32_t kSlope = kWantS | kTermSlopeA | kTermSlopeD;  // s = A x + D m
constexpr uint32_t kFromHistory = kTermD | kTermE0;              // x' = d m + e0 h0

// Rows met in every common sampler get loops of their own; the others run one loop that tests the terms (the tests do
// not depend on i). Both give the same bits: it is the same formula.
template <class T>
DK_BODY void step_body(const StepSpan<T>& span) {
  switch (span.terms) {
    case kFromEps:
      return step_loop<false>(span, kFromEps);
    case kFromEps | kWantX0:
      return step_loop<false>(span, kFromEps | kWantX0);
    case kFromEps | kTermW:
      return step_loop<false>(span, kFromEps | kTermW);
    case kFromEps | kTermG:
      return step_loop<false>(span, kFromEps | kTermG);
    case kFromEps | kTermA:
      return step_loop<false>(span, kFromEps | kTermA);
    case kX0 | kTermB:
      return step_loop<false>(span, kX0 | kTermB);
    case kFromX0:
      return step_loop<false>(span, kFromX0);
    case kFromX0 | kWantX0:
      return step_loop<false>(span, kFromX0 | kWantX0);
    case kFromX0 | kTermClip:
      return step_loop<false>(span, kFromX0 | kTermClip);
    case kFromX0 | kTermClip | kWantX0:
      return step_loop<false>(span, kFromX0 | kTermClip | kWantX0);
    case kFromX0 | kTermClip | kWantNext:
      return step_loop<false>(span, kFromX0 | kTermClip | kWantNext);
    case kFromX0 | kTermG:
      return step_loop<false>(span, kFromX0 | kTermG);
    case kFromX0 | kTermClip | kTermG:
      return step_loop<false>(span, kFromX0 | kTermClip | kTermG);
    case kFromX0 | kTermE0 | kWantX0:
      return step_loop<false>(span, kFromX0 | kTermE0 | kWantX0);
    case kFromSlope:
      return step_loop<false>(span, kFromSlope);
    case kFromSlope | kWantNext:
      return step_loop<false>(span, kFromSlope | kWantNext);
    case kFromSlope | kTermG:
      return step_loop<false>(span, kFromSlope | kTermG);
    case kFromSlope | kTermW | kWantNext:
      return step_loop<false>(span, kFromSlope | kTermW | kWantNext);
    case kFromSlope | kSlope:
      return step_loop<false>(span, kFromSlope | kSlope);
    case kFromSlope | kSlope | kWantNext:
      return step_loop<false>(span, kFromSlope | kSlope | kWantNext);
    case kFromHistory:
      return step_loop<false>(span, kFromHistory);
    case kFromHistory | kWantNext:
      return step_loop<false>(span, kFromHistory | kWantNext);
    case kFromHistory | kTermA:
      return step_loop<false>(span, kFromHistory | kTermA);
    case kFromHistory | kTermA | kWantNext:
      return step_loop<false>(span, kFromHistory | kTermA | kWantNext);
    default:
      return step_loop<true>(span, span.terms);
  }
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
DK_BODY T loss_body(const LossSpan<T>& span) {
  const LossCoefficients<T> k = span.k;
  const T *pred = span.pred, *x0 = span.x0, *z = span.z;
  T *squares = span.squares, *grad = span.grad;
  if (grad != nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < span.n; ++i) {
      const T difference = sub(pred[i], affine(k.u, x0[i], k.v, z[i]));
      squares[i] = mul(difference, difference);
      grad[i] = mul(k.gradient, difference);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < span.n; ++i) {
      const T difference = sub(pred[i], affine(k.u, x0[i], k.v, z[i]));
      squares[i] = mul(difference, difference);
    }
  }
  for (int64_t i = span.n; i < kLossBlock; ++i) squares[i] = T(0);
  for (int64_t half = kLossBlock / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) squares[i] = add(squares[i], squares[i + half]);
  }
  return squares[0];
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

// Defines the functions of one table: NAME of the Isa, TARGET attribute, NOISE (as PortableNoise), widen and narrow
// f16.
#define DK_DEFINE_ISA(VARIABLE, NAME, TARGET, NOISE, WIDEN_F16, NARROW_F16)                                 \
  namespace dk::cpu {                                                                                       \
  namespace {                                                                                               \
  TARGET void normals_span(uint64_t seed, uint64_t stream, uint64_t q0, int64_t quads, float* out) {        \
    const Keys keys(seed);                                                                                  \
    for (int64_t done = 0; done < quads; done += kQuadsAtOnce) {                                            \
      Group words;                                                                                          \
      Lanes lanes;                                                                                          \
      NOISE::words(keys, stream, q0 + static_cast<uint64_t>(done), words);                                  \
      normals_of_group(words, lanes);                                                                       \
      NOISE::interleave(lanes, out + 4 * done);                                                             \
    }                                                                                                       \
  }                                                                                                         \
  TARGET void step_f32(const StepSpan<float>& span) { step_body(span); }                                    \
  TARGET void step_f64(const StepSpan<double>& span) { step_body(span); }                                   \
  TARGET void noising_f32(const NoisingSpan<float>& span) { noising_body(span); }                           \
  TARGET void noising_f64(const NoisingSpan<double>& span) { noising_body(span); }                          \
  TARGET float loss_f32(const LossSpan<float>& span) { return loss_body(span); }                            \
  TARGET double loss_f64(const LossSpan<double>& span) { return loss_body(span); }                          \
  TARGET void widen_bf16_span(const Bfloat16* in, float* out, int64_t n) { widen_bf16_body(in, out, n); }   \
  TARGET void narrow_bf16_span(const float* in, Bfloat16* out, int64_t n) { narrow_bf16_body(in, out, n); } \
  }                                                                                                         \
  const Isa VARIABLE{NAME,     normals_span, step_f32,  step_f64,   noising_f32,     noising_f64,           \
                     loss_f32, loss_f64,     WIDEN_F16, NARROW_F16, widen_bf16_span, narrow_bf16_span};     \
  }
