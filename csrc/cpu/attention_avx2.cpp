// The inner loops of attention for AVX2 + FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "../core/dtype.h"
#include "targets.h"

#define DK_LANES_TARGET DK_AVX2

namespace dk::cpu {
namespace {

struct V {
  using Lanes = __m256;
  static constexpr int kWidth = 8, kWide = 2;
  DK_LANES_TARGET static Lanes load(const float* p) { return _mm256_load_ps(p); }
  DK_LANES_TARGET static void store(float* p, Lanes a) { _mm256_store_ps(p, a); }
  DK_LANES_TARGET static Lanes fill(float a) { return _mm256_set1_ps(a); }
  DK_LANES_TARGET static Lanes add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
  DK_LANES_TARGET static Lanes sub(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
  DK_LANES_TARGET static Lanes mul(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
  DK_LANES_TARGET static Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
  DK_LANES_TARGET static Lanes max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
  DK_LANES_TARGET static Lanes at_least(Lanes x) { return max(fill(-127.0f), x); }  // below it 2^x is 0
  DK_LANES_TARGET static Lanes fraction(Lanes x) {
    x = at_least(x);
    return sub(x, _mm256_floor_ps(x));
  }
  DK_LANES_TARGET static Lanes times_power(Lanes p, Lanes x) {
    const __m256i whole = _mm256_cvttps_epi32(_mm256_floor_ps(at_least(x)));
    return mul(p, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(whole, _mm256_set1_epi32(127)), 23)));
  }
  DK_LANES_TARGET static __m128i halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  DK_LANES_TARGET static Lanes loadu(const float* p) { return _mm256_loadu_ps(p); }
  DK_LANES_TARGET static Lanes loadu(const Bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves(p)), 16));
  }
  DK_LANES_TARGET static Lanes loadu(const Half* p) { return _mm256_cvtph_ps(halves(p)); }
  template <class T>
  DK_LANES_TARGET static Lanes part(const T* p) {
    return loadu(p);
  }
  DK_LANES_TARGET static void storeu(float* p, Lanes a) { _mm256_storeu_ps(p, a); }
  DK_LANES_TARGET static void store_part(float* p, Lanes a) { storeu(p, a); }
  DK_LANES_TARGET static void store_sums(float* p, Lanes a, Lanes b, Lanes c, Lanes d) {
    const Lanes pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }
};

}  // namespace
}  // namespace dk::cpu

#include "attention_grad_lanes.h"
#include "attention_rows_lanes.h"

namespace dk::cpu {
const AttentionTiles kAvx2Tiles{"avx2",        kLanes,        multiply,           nullptr,
                                softmax_float, scale_columns, softmax_grad_float, weight_sums,
                                dot_columns,   nullptr,       kRowKernels};
}  // namespace dk::cpu
#endif
