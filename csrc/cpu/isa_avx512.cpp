// AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12's own intrinsics (GCC bug 105593)
#endif
#include <immintrin.h>

#include "spans.h"

namespace dk::cpu {
namespace {

// Eight quads at a time, one 32-bit word in the low half of each 64-bit lane: the widening multiply ignores the rest.
struct Avx512Noise {
  DK_AVX512 static void words(const Keys& keys, uint64_t stream, uint64_t q0, Group& out) {
    const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
    __m512i c0[2], c1[2], c2[2], c3[2];
    for (int half = 0; half < 2; ++half) {  // even and odd quads
      const __m512i q = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(q0 + half)),
                                         _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14));
      c0[half] = q;
      c1[half] = _mm512_srli_epi64(q, 32);
      c2[half] = _mm512_set1_epi64(static_cast<int64_t>(stream & 0xffffffffu));
      c3[half] = _mm512_set1_epi64(static_cast<int64_t>(stream >> 32));
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i key0 = _mm512_set1_epi64(static_cast<int64_t>(keys.k0[round]));
      const __m512i key1 = _mm512_set1_epi64(static_cast<int64_t>(keys.k1[round]));
      for (int half = 0; half < 2; ++half) {
        constexpr int kXor3 = 0x96;
        const __m512i a = _mm512_mul_epu32(c0[half], m0), b = _mm512_mul_epu32(c2[half], m1);
        c0[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(b, 32), c1[half], key0, kXor3);
        c1[half] = b;
        c2[half] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(a, 32), c3[half], key1, kXor3);
        c3[half] = a;
      }
    }
    const __m512i* r[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) {
      const __m512i merged = _mm512_mask_blend_epi32(0xaaaa, r[j][0], _mm512_slli_epi64(r[j][1], 32));
      _mm512_storeu_si512(&out[j][0], merged);
    }
  }

  DK_AVX512 static void interleave(const Lanes& lanes, float* out) {
    const __m512 a = _mm512_loadu_ps(lanes[0]), b = _mm512_loadu_ps(lanes[1]);
    const __m512 c = _mm512_loadu_ps(lanes[2]), d = _mm512_loadu_ps(lanes[3]);
    const __m512d ab0 = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), ab2 = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd0 = _mm512_castps_pd(_mm512_unpacklo_ps(c, d)), cd2 = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    // q<k> holds quads k, k + 4, k + 8, k + 12 in its four 128-bit parts
    const __m512 q0 = _mm512_castpd_ps(_mm512_unpacklo_pd(ab0, cd0)),
                 q1 = _mm512_castpd_ps(_mm512_unpackhi_pd(ab0, cd0));
    const __m512 q2 = _mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)),
                 q3 = _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2));
    const __m512 low01 = _mm512_shuffle_f32x4(q0, q1, 0x44), low23 = _mm512_shuffle_f32x4(q2, q3, 0x44);
    const __m512 high01 = _mm512_shuffle_f32x4(q0, q1, 0xee), high23 = _mm512_shuffle_f32x4(q2, q3, 0xee);
    _mm512_storeu_ps(out, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(out + 16, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(out + 32, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(out + 48, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
};
static_assert(kQuadsAtOnce == 16, "one group is two vectors of eight quads");

DK_AVX512 void widen_f16_span(const Half* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = widen(in[i]);
}

DK_AVX512 void narrow_f16_span(const float* in, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) out[i] = narrow_f16(in[i]);
}

}  // namespace
}  // namespace dk::cpu

DK_DEFINE_ISA(kAvx512, Loops::avx512, DK_AVX512, Avx512Noise, widen_f16_span, narrow_f16_span)
#endif
