// The step over a span: at most kBlock elements of one sample as contiguous arrays, or any number of them where one
// loop is all there is to do.
#pragma once

#include "../core/step.h"
#include "isa.h"

namespace dk::cpu {

// Every pointer of a span is valid for n elements (absent operands read zeros, outputs nobody wants are scratch),
// unless is_one_loop. An output is none of the operands of a later stage (h, z, mask, known, z2).
template <class T>
struct StepSpan {
  const T *x, *u, *c, *h[kHistories], *z, *mask, *known, *z2;
  T *out, *x0, *s, *next, *guided;  // guided: scratch for m
  StepCoefficients<T> k;
  uint32_t terms;
  int64_t n;
};

// Terms of a span's first stage (step_base).
constexpr uint32_t kBaseTerms = kTermP | kTermQ | kTermR | kTermClip | kTermA | kTermB | kTermD | kTermSlopeA |
                                kTermSlopeB | kTermSlopeD | kWantX0 | kWantS;

// Rows met in every common sampler have base loops of their own: x' from x0 and eps, from x and x0, from x and a slope.
constexpr uint32_t kX0 = kTermP | kTermQ;
constexpr uint32_t kFromEps = kX0 | kTermB | kTermD;
constexpr uint32_t kFromX0 = kX0 | kTermA | kTermB;
constexpr uint32_t kFromSlope = kTermA | kTermD;
constexpr uint32_t kSlope = kWantS | kTermSlopeD;
constexpr uint32_t kSlopeOfX0 = kWantS | kTermSlopeA | kTermSlopeB;
#define DK_FOR_BASE_LOOPS(DO)             \
  DO(kFromEps)                            \
  DO(kFromEps | kWantX0)                  \
  DO(kFromEps | kTermClip)                \
  DO(kFromEps | kTermClip | kWantX0)      \
  DO(kFromEps | kTermA)                   \
  DO(kX0 | kTermB)                        \
  DO(kX0 | kTermB | kWantX0)              \
  DO(kX0 | kTermB | kTermClip)            \
  DO(kX0 | kTermB | kTermClip | kWantX0)  \
  DO(kFromX0)                             \
  DO(kFromX0 | kWantX0)                   \
  DO(kFromX0 | kTermClip)                 \
  DO(kFromX0 | kTermClip | kWantX0)       \
  DO(kFromSlope)                          \
  DO(kFromSlope | kSlope)                 \
  DO(kFromSlope | kSlope | kTermSlopeA)   \
  DO(kFromSlope | kX0 | kWantX0)          \
  DO(kFromSlope | kX0 | kWantX0 | kSlope) \
  DO(kFromX0 | kTermClip | kSlopeOfX0)    \
  DO(kTermD | kX0 | kWantX0)              \
  DO(kTermD | kSlope)                     \
  DO(kTermD)                              \
  DO(kTermA)

// Is such a loop all there is to do? It reads and writes only what its terms name, over any length.
inline bool is_one_loop(uint32_t terms) {
  switch (terms) {
#define DK_CASE(TERMS) case TERMS:
    DK_FOR_BASE_LOOPS(DK_CASE)
#undef DK_CASE
    return true;
    default:
      return false;
  }
}

void step_span(const StepSpan<float>& span);
void step_span(const StepSpan<double>& span);

}  // namespace dk::cpu
