// The universal sampler step: one row of coefficients, one formula (docs: diffkern.ops.step).
//
//   m   = u + w (c - u)
//   x0  = clamp(p x + q m + r z, -clip, clip)
//   x'  = a x + b x0 + d m + sum_k e_k h_k + g z
//   s   = A x + B x0 + D m
//   x'  = x' where mask is 1, known_s known + known_n z2 where it is 0, the blend of both between
//
// A term whose coefficient is 0 is neither read nor drawn.
#pragma once

#include "args.h"

namespace dk {

#define DK_STEP_COLUMNS(COLUMN) \
  COLUMN(kW, "w")               \
  COLUMN(kP, "p")               \
  COLUMN(kQ, "q")               \
  COLUMN(kR, "r")               \
  COLUMN(kClip, "clip")         \
  COLUMN(kA, "a")               \
  COLUMN(kB, "b")               \
  COLUMN(kD, "d")               \
  COLUMN(kE0, "e0")             \
  COLUMN(kE1, "e1")             \
  COLUMN(kE2, "e2")             \
  COLUMN(kE3, "e3")             \
  COLUMN(kG, "g")               \
  COLUMN(kSlopeA, "A")          \
  COLUMN(kSlopeB, "B")          \
  COLUMN(kSlopeD, "D")          \
  COLUMN(kNext, "k")            \
  COLUMN(kKnownS, "known_s")    \
  COLUMN(kKnownN, "known_n")    \
  COLUMN(kStream, "stream")     \
  COLUMN(kKnownStream, "known_stream")
enum Column : int { DK_STEP_COLUMNS(DK_COLUMN_NUMBER) kColumns };
constexpr int kHistories = 4;

struct StepArgs {
  Space space;
  View x, u, c, h[kHistories], noise, mask, known;  // inputs, each may be absent
  View out, x0, s, next, next2;                     // outputs; out is always there. next2: second half of a [2B] next
  Dtype state;                                      // of x, h, noise, known, out, x0, s
  Rows rows;
  double row[kColumns];  // the row, if rows.table is nullptr
  Seeds seeds;
};

// Which terms of a row are at work.
enum Term : uint32_t {
  kTermW = 1u << 0,
  kTermP = 1u << 1,
  kTermQ = 1u << 2,
  kTermR = 1u << 3,
  kTermClip = 1u << 4,
  kTermA = 1u << 5,
  kTermB = 1u << 6,
  kTermD = 1u << 7,
  kTermE0 = 1u << 8,  // E1, E2, E3 are the next three bits
  kTermG = 1u << 12,
  kTermSlopeA = 1u << 13,
  kTermSlopeB = 1u << 14,
  kTermSlopeD = 1u << 15,
  kTermMask = 1u << 16,
  kTermKnownS = 1u << 17,
  kTermKnownN = 1u << 18,
};
// Outputs that are asked for beside x'.
enum Want : uint32_t { kWantX0 = 1u << 24, kWantS = 1u << 25, kWantNext = 1u << 26 };

constexpr uint32_t kReadsNoise = kTermR | kTermG;
constexpr uint32_t kReadsX0Terms = kTermP | kTermQ | kTermR | kTermClip;

// Terms of a row, without those whose result nobody uses. `want` has kWantX0, kWantS and kTermMask as they apply.
DK_HD uint32_t step_terms(const double* row, uint32_t want) {
  uint32_t terms = want;
  if (row[kA] != 0) terms |= kTermA;
  if (row[kB] != 0) terms |= kTermB;
  if (row[kD] != 0) terms |= kTermD;
  for (int k = 0; k < kHistories; ++k) {
    if (row[kE0 + k] != 0) terms |= kTermE0 << k;
  }
  if (row[kG] != 0) terms |= kTermG;
  if (want & kWantS) {
    if (row[kSlopeA] != 0) terms |= kTermSlopeA;
    if (row[kSlopeB] != 0) terms |= kTermSlopeB;
    if (row[kSlopeD] != 0) terms |= kTermSlopeD;
  }
  if (terms & (kTermB | kTermSlopeB | kWantX0)) {
    if (row[kP] != 0) terms |= kTermP;
    if (row[kQ] != 0) terms |= kTermQ;
    if (row[kR] != 0) terms |= kTermR;
    if (row[kClip] < INFINITY) terms |= kTermClip;
  }
  if ((terms & (kTermQ | kTermD | kTermSlopeD)) && row[kW] != 0) terms |= kTermW;
  if (want & kTermMask) {
    if (row[kKnownS] != 0) terms |= kTermKnownS;
    if (row[kKnownN] != 0) terms |= kTermKnownN;
  }
  return terms;
}

// A row in the arithmetic of the state: float, or double for float64 tensors.
template <class T>
struct StepCoefficients {
  T w, p, q, r, clip, a, b, d, e[kHistories], g, slope_a, slope_b, slope_d, next, known_s, known_n;
};

template <class T>
DK_HD StepCoefficients<T> step_coefficients(const double* row) {
  StepCoefficients<T> c;
  c.w = static_cast<T>(row[kW]);
  c.p = static_cast<T>(row[kP]);
  c.q = static_cast<T>(row[kQ]);
  c.r = static_cast<T>(row[kR]);
  c.clip = static_cast<T>(row[kClip]);
  c.a = static_cast<T>(row[kA]);
  c.b = static_cast<T>(row[kB]);
  c.d = static_cast<T>(row[kD]);
  for (int k = 0; k < kHistories; ++k) c.e[k] = static_cast<T>(row[kE0 + k]);
  c.g = static_cast<T>(row[kG]);
  c.slope_a = static_cast<T>(row[kSlopeA]);
  c.slope_b = static_cast<T>(row[kSlopeB]);
  c.slope_d = static_cast<T>(row[kSlopeD]);
  c.next = static_cast<T>(row[kNext]);
  c.known_s = static_cast<T>(row[kKnownS]);
  c.known_n = static_cast<T>(row[kKnownN]);
  return c;
}

template <class T>
struct StepInputs {
  T x, u, c, h[kHistories], z, mask, known, z2;
};
template <class T>
struct StepOutputs {
  T x, x0, s, next;
};

template <class T>
DK_HD T clamp(T v, T limit) {  // NaN stays NaN, as in torch.clamp
  const T above = v < -limit ? -limit : v;
  return above > limit ? limit : above;
}

// `now` if the term is at work, else `before`. On the host by bit masks: the tests do not depend on the element, and
// g++ would otherwise leave branches in the loop and not vectorise it.
#if defined(__CUDA_ARCH__)
template <class T>
DK_HD T pick(uint32_t term, T now, T before) {
  return term ? now : before;
}
#else
template <class T, class Bits>
DK_HD T pick_bits(uint32_t term, T now, T before) {
  const Bits mask = Bits(0) - Bits(term != 0);
  Bits n, b;
  __builtin_memcpy(&n, &now, sizeof n);
  __builtin_memcpy(&b, &before, sizeof b);
  n = (n & mask) | (b & ~mask);
  __builtin_memcpy(&now, &n, sizeof n);
  return now;
}
DK_HD float pick(uint32_t term, float now, float before) { return pick_bits<float, uint32_t>(term, now, before); }
DK_HD double pick(uint32_t term, double now, double before) { return pick_bits<double, uint64_t>(term, now, before); }
#endif

// The step in stages, each one formula, so that a loop may run over one of them at a time.
template <class T>
DK_HD T guided(T w, T u, T c) {
  return fma(w, sub(c, u), u);
}

template <class T>
struct StepBase {
  T x, x0, s;  // x' without histories and g z; x0; s
};

template <class T>
DK_HD StepBase<T> step_base(const StepCoefficients<T>& k, uint32_t terms, T x, T m, T z) {
  T x0 = pick(terms & kTermP, mul(k.p, x), T(0));
  x0 = pick(terms & kTermQ, fma(k.q, m, x0), x0);
  x0 = pick(terms & kTermR, fma(k.r, z, x0), x0);
  x0 = pick(terms & kTermClip, clamp(x0, k.clip), x0);

  T out = pick(terms & kTermA, mul(k.a, x), T(0));
  out = pick(terms & kTermB, fma(k.b, x0, out), out);
  out = pick(terms & kTermD, fma(k.d, m, out), out);

  T s = pick(terms & kTermSlopeA, mul(k.slope_a, x), T(0));
  s = pick(terms & kTermSlopeB, fma(k.slope_b, x0, s), s);
  s = pick(terms & kTermSlopeD, fma(k.slope_d, m, s), s);
  return {out, x0, s};
}

template <class T>
DK_HD T step_masked(const StepCoefficients<T>& k, uint32_t terms, T x, T mask, T known, T z2) {
  T kn = pick(terms & kTermKnownS, mul(k.known_s, known), T(0));
  kn = pick(terms & kTermKnownN, fma(k.known_n, z2, kn), kn);
  const T blend = fma(mask, x, mul(sub(T(1), mask), kn));
  const T open = mask == T(1) ? x : blend;
  return mask == T(0) ? kn : open;
}

// All stages of one element.
template <class T>
DK_HD StepOutputs<T> step_element(const StepCoefficients<T>& k, uint32_t terms, const StepInputs<T>& in) {
  const T m = pick(terms & kTermW, guided(k.w, in.u, in.c), in.u);
  const StepBase<T> base = step_base(k, terms, in.x, m, in.z);
  T x = base.x;
  x = pick(terms & (kTermE0 << 0), fma(k.e[0], in.h[0], x), x);
  x = pick(terms & (kTermE0 << 1), fma(k.e[1], in.h[1], x), x);
  x = pick(terms & (kTermE0 << 2), fma(k.e[2], in.h[2], x), x);
  x = pick(terms & (kTermE0 << 3), fma(k.e[3], in.h[3], x), x);
  x = pick(terms & kTermG, fma(k.g, in.z, x), x);
  x = pick(terms & kTermMask, step_masked(k, terms, x, in.mask, in.known, in.z2), x);
  return {x, base.x0, base.s, mul(k.next, x)};
}

namespace cpu {
void step(const StepArgs& args, int64_t begin, int64_t end);
}
namespace cuda {
int step(const StepArgs& args, void* stream);
}

}  // namespace dk
