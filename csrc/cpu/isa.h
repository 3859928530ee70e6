// The table of inner loops ("spans") that exist once for every instruction set. Drivers call them through isa(), so
// that DIFFKERN_ISA=scalar|avx2|avx512|avx512_bf16 can force a level and tests can compare the bits of all of them.
#pragma once

#include "../core/learned_step.h"
#include "../core/loss.h"
#include "../core/step_logprob.h"
#include "../core/variational.h"

namespace dk::cpu {

constexpr int64_t kBlock = 1024;  // elements of a span at most; a multiple of 64
static_assert(kBlock == kSumBlock, "a block of the ordered sums is one span");

constexpr int64_t kQuadsAtOnce = 16;  // normals() writes whole groups of so many quads

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

// z scaled to the learned standard deviation of every element; out may be z.
template <class T>
struct LearnedSpan {
  const T *v, *z;
  T* out;
  LearnedDeviation<T> k;
  int64_t n;
};

template <class T>
struct NoisingSpan {
  const T *x0, *z;
  T *out, *target;  // either may be null
  NoisingCoefficients<T> k;
  int64_t n;
};

template <class T>
struct LossSpan {
  const T *pred, *x0, *z;
  T* grad;     // may be null
  T* squares;  // kBlock values of scratch
  LossCoefficients<T> k;
  int64_t n;
};

// Absent operands read zeros, outputs nobody wants are scratch.
template <class T>
struct VariationalSpan {
  const T *pred, *w, *x0, *z;
  T *grad, *grad_w, *squares, *nats;  // squares, nats: kBlock values of scratch
  VariationalCoefficients<T> k;
  int64_t n;
};

template <class T>
struct VariationalSums {
  T squares, nats;
};

// Absent operands read zeros, gradients nobody wants are scratch.
template <class T>
struct LogprobSpan {
  StepSpan<T> mean;  // gives the mean in `out`, and x0
  const T *after, *v, *x0;
  T *grad_u, *grad_c, *grad_v, *energies;  // energies: kBlock values of scratch
  LogprobRow<T> row;
  bool learned, wants, splits;  // wants: gradients; splits: those of u and c apart
};

struct Isa {
  // Normals of quads q0 .. q0 + quads - 1, rounded up to whole groups: out has room for them.
  void (*normals)(uint64_t seed, uint64_t stream, uint64_t q0, int64_t quads, float* out);
  void (*step_f32)(const StepSpan<float>&);
  void (*step_f64)(const StepSpan<double>&);
  void (*learned_f32)(const LearnedSpan<float>&);
  void (*learned_f64)(const LearnedSpan<double>&);
  void (*noising_f32)(const NoisingSpan<float>&);
  void (*noising_f64)(const NoisingSpan<double>&);
  float (*loss_f32)(const LossSpan<float>&);
  double (*loss_f64)(const LossSpan<double>&);
  VariationalSums<float> (*variational_f32)(const VariationalSpan<float>&);
  VariationalSums<double> (*variational_f64)(const VariationalSpan<double>&);
  float (*step_logprob_f32)(const LogprobSpan<float>&);
  double (*step_logprob_f64)(const LogprobSpan<double>&);
  void (*widen_f16)(const Half*, float*, int64_t n);
  void (*narrow_f16)(const float*, Half*, int64_t n);
  void (*widen_bf16)(const Bfloat16*, float*, int64_t n);
  void (*narrow_bf16)(const float*, Bfloat16*, int64_t n);
};

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512;
#endif

const Isa& isa();  // the level in use

}  // namespace dk::cpu
