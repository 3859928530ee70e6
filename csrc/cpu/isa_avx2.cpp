// AVX2 + FMA + F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "spans.h"

namespace dk::cpu {
namespace {

// Four quads in a vector, one 32-bit word in the low half of each 64-bit lane: the widening multiply ignores the rest.
// All four vectors of a group go through a round together, as one alone waits for its products.
struct Avx2Noise {
  DK_AVX2 static void words(const Keys& keys, uint64_t stream, uint64_t q0, Group& out) {
    constexpr int kVectors = kQuadsAtOnce / 4;
    const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
    __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
    for (int w = 0; w < kVectors; ++w) {  // even and odd quads of the first eight, then of the next
      const int64_t first = static_cast<int64_t>(q0 + w / 2 * 8 + w % 2);
      const __m256i q = _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 2, 4, 6));
      c0[w] = q;
      c1[w] = _mm256_srli_epi64(q, 32);
      c2[w] = _mm256_set1_epi64x(static_cast<int64_t>(stream & 0xffffffffu));
      c3[w] = _mm256_set1_epi64x(static_cast<int64_t>(stream >> 32));
    }
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi64x(static_cast<int64_t>(keys.k0[round]));
      const __m256i key1 = _mm256_set1_epi64x(static_cast<int64_t>(keys.k1[round]));
#pragma GCC unroll 4
      for (int w = 0; w < kVectors; ++w) {
        const __m256i a = _mm256_mul_epu32(c0[w], m0), b = _mm256_mul_epu32(c2[w], m1);
        c0[w] = _mm256_xor_si256(_mm256_srli_epi64(b, 32), _mm256_xor_si256(c1[w], key0));
        c1[w] = b;
        c2[w] = _mm256_xor_si256(_mm256_srli_epi64(a, 32), _mm256_xor_si256(c3[w], key1));
        c3[w] = a;
      }
    }
    for (int w = 0; w < kVectors; w += 2) {
      const __m256i* r[4] = {c0 + w, c1 + w, c2 + w, c3 + w};
      for (int j = 0; j < 4; ++j) {
        const __m256i merged = _mm256_blend_epi32(r[j][0], _mm256_slli_epi64(r[j][1], 32), 0xaa);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(&out[j][4 * w]), merged);
      }
    }
  }

  DK_AVX2 static void interleave(const Lanes& lanes, float* out) {
    for (int64_t i = 0; i < kQuadsAtOnce; i += 8) {
      const __m256 a = _mm256_loadu_ps(&lanes[0][i]), b = _mm256_loadu_ps(&lanes[1][i]);
      const __m256 c = _mm256_loadu_ps(&lanes[2][i]), d = _mm256_loadu_ps(&lanes[3][i]);
      const __m256d ab0 = _mm256_castps_pd(_mm256_unpacklo_ps(a, b)), ab2 = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
      const __m256d cd0 = _mm256_castps_pd(_mm256_unpacklo_ps(c, d)), cd2 = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
      // quad k in the low half, quad k + 4 in the high half
      const __m256 q0 = _mm256_castpd_ps(_mm256_unpacklo_pd(ab0, cd0)),
                   q1 = _mm256_castpd_ps(_mm256_unpackhi_pd(ab0, cd0));
      const __m256 q2 = _mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)),
                   q3 = _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2));
      _mm256_storeu_ps(out + 4 * i, _mm256_permute2f128_ps(q0, q1, 0x20));
      _mm256_storeu_ps(out + 4 * i + 8, _mm256_permute2f128_ps(q2, q3, 0x20));
      _mm256_storeu_ps(out + 4 * i + 16, _mm256_permute2f128_ps(q0, q1, 0x31));
      _mm256_storeu_ps(out + 4 * i + 24, _mm256_permute2f128_ps(q2, q3, 0x31));
    }
  }
};

DK_AVX2 void widen_f16_span(const Half* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
  for (; i < n; ++i) out[i] = widen(in[i]);
}

DK_AVX2 void narrow_f16_span(const float* in, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) out[i] = narrow_f16(in[i]);
}

}  // namespace
}  // namespace dk::cpu

DK_DEFINE_ISA(kAvx2, Loops::avx2, DK_AVX2, Avx2Noise, widen_f16_span, narrow_f16_span)
#endif
