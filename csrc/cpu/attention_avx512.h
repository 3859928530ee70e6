// V of attention_lanes.h: sixteen floats.
#pragma once

#include <immintrin.h>

#include "../core/dtype.h"

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
  DK_LANES_TARGET static __m128i eight(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  DK_LANES_TARGET static __m256i sixteen(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  DK_LANES_TARGET static Lanes widened(const Bfloat16*, __m256i p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(p), 16));
  }
  DK_LANES_TARGET static Lanes widened(const Half*, __m256i p) { return _mm512_cvtph_ps(p); }
  DK_LANES_TARGET static Lanes loadu(const float* p) { return _mm512_loadu_ps(p); }
  template <class T>
  DK_LANES_TARGET static Lanes loadu(const T* p) {
    return widened(p, sixteen(p));
  }
  DK_LANES_TARGET static Lanes part(const float* p) { return _mm512_maskz_loadu_ps(0xff, p); }
  template <class T>
  DK_LANES_TARGET static Lanes part(const T* p) {
    return widened(p, _mm256_zextsi128_si256(eight(p)));
  }
  DK_LANES_TARGET static void storeu(float* p, Lanes a) { _mm512_storeu_ps(p, a); }
  DK_LANES_TARGET static void store_part(float* p, Lanes a) { _mm512_mask_storeu_ps(p, 0xff, a); }
  DK_LANES_TARGET static Lanes in_pairs(Lanes a, Lanes b) {  // of neighbours, in every quarter: a0 a1, b0 b1, ...
    return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  DK_LANES_TARGET static void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    const __m512d ab = _mm512_castps_pd(in_pairs(a, b)), cd = _mm512_castps_pd(in_pairs(c, d));
    const Lanes quarters =
        add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }
};

}  // namespace
}  // namespace dk::cpu
