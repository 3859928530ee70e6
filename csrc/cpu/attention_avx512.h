// V of attention_lanes.h: sixteen floats.
#pragma once

#include <immintrin.h>

namespace dk::cpu {
namespace {

struct V {
  using Lanes = __m512;
  static constexpr int kWidth = 16, kWide = 4;
  DK_LANES_TARGET static Lanes load(const float* p) { return _mm512_load_ps(p); }
  DK_LANES_TARGET static void store(float* p, Lanes a) { _mm512_store_ps(p, a); }
  DK_LANES_TARGET static Lanes fill(float a) { return _mm512_set1_ps(a); }
  DK_LANES_TARGET static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
  DK_LANES_TARGET static Lanes sub(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
  DK_LANES_TARGET static Lanes mul(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
  DK_LANES_TARGET static Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
  DK_LANES_TARGET static Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
  DK_LANES_TARGET static Lanes fraction(Lanes x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF); }
  DK_LANES_TARGET static Lanes times_power(Lanes p, Lanes x) { return _mm512_scalef_ps(p, x); }
};

}  // namespace
}  // namespace dk::cpu
