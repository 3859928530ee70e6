// The inner loops of attention on every machine: vectors of four floats, in the compiler's own vector type.
#include "../core/dtype.h"

#define DK_LANES_TARGET

namespace dk::cpu {
namespace {

struct V {
  typedef float Lanes __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  static constexpr int kWidth = 4, kWide = 2;
  DK_HD static Lanes load(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
  DK_HD static void store(float* p, Lanes a) { *reinterpret_cast<Lanes*>(p) = a; }
  DK_HD static Lanes fill(float a) { return Lanes{a, a, a, a}; }
  DK_HD static Lanes add(Lanes a, Lanes b) { return a + b; }
  DK_HD static Lanes sub(Lanes a, Lanes b) { return a - b; }
  DK_HD static Lanes mul(Lanes a, Lanes b) { return a * b; }
  DK_HD static Lanes fma(Lanes a, Lanes b, Lanes c) { return a * b + c; }  // two roundings: one is slow in software
  DK_HD static Lanes max(Lanes a, Lanes b) {
    const Ints greater = a > b;
    return reinterpret_cast<Lanes>((greater & reinterpret_cast<Ints>(a)) | (~greater & reinterpret_cast<Ints>(b)));
  }
  // Below it 2^x is 0. Adding 1.5 2^23 leaves floor(x) in the low bits; for a whole x it may be x - 1.
  DK_HD static Lanes at_least(Lanes x) { return max(fill(-126.75f), x); }
  DK_HD static Lanes fraction(Lanes x) {
    x = at_least(x);
    return x - ((x - 0.5f + 12582912.0f) - 12582912.0f);
  }
  DK_HD static Lanes times_power(Lanes p, Lanes x) {
    const Ints whole = reinterpret_cast<Ints>(at_least(x) - 0.5f + 12582912.0f);
    return p * reinterpret_cast<Lanes>((whole + 127) << 23);
  }
  template <class T>
  DK_HD static Lanes loadu(const T* p) {
    return Lanes{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  template <class T>
  DK_HD static Lanes part(const T* p) {
    return loadu(p);
  }
  DK_HD static void storeu(float* p, Lanes a) { __builtin_memcpy(p, &a, sizeof a); }
  DK_HD static void store_part(float* p, Lanes a) { storeu(p, a); }
  DK_HD static float sum(Lanes a) { return (a[0] + a[1]) + (a[2] + a[3]); }
  DK_HD static void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    p[0] = sum(a), p[1] = sum(b), p[2] = sum(c), p[3] = sum(d);
  }
};

}  // namespace
}  // namespace dk::cpu

#include "attention_grad_lanes.h"
#include "attention_rows_lanes.h"

namespace dk::cpu {
const AttentionTiles kScalarTiles{"scalar",           kLanes,      multiply,    nullptr, softmax_float, scale_columns,
                                  softmax_grad_float, weight_sums, dot_columns, nullptr, kRowKernels};
}  // namespace dk::cpu
