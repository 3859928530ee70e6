// The inner loops of attention for AVX-512 with bfloat16 dot products.
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12's own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "targets.h"

#define DK_LANES_TARGET DK_AVX512_BF16

#include "attention_avx512.h"
#include "attention_grad_lanes.h"
#include "attention_rows_lanes.h"

namespace dk::cpu {
namespace {

struct PairProduct {
  using Element = Pair;
  using Operand = __m512bh;
  DK_LANES_TARGET static Operand load(const Pair* b) { return reinterpret_cast<Operand>(_mm512_load_si512(b)); }
  DK_LANES_TARGET static Operand fill(const Pair* a) {
    return reinterpret_cast<Operand>(_mm512_set1_epi32(static_cast<int32_t>(a->bits)));
  }
  DK_LANES_TARGET static V::Lanes fma(Operand a, Operand b, V::Lanes c) { return _mm512_dpbf16_ps(c, a, b); }
};

DK_LANES_TARGET void multiply_pairs(const TileProduct<Pair>& tile) { product<PairProduct>(tile); }

// Of each lane the bfloat16 of `even` in the low half, that of `odd` in the high half.
DK_LANES_TARGET inline __m512i pair_up(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
}

// The weights of `key` (even) and the next one go to pairs; returns the sum with both, as rounded.
DK_LANES_TARGET inline V::Lanes weigh_pair(const SoftmaxTile& t, int64_t key, int64_t column, V::Lanes maximum,
                                           V::Lanes sum) {
  const float* s = t.logits + key * t.queries + column;
  const CoarsePowers powers(t.scale);
  const V::Lanes even = softmax_weight(powers, V::load(s), maximum);
  const V::Lanes odd = key + 1 < t.keys ? softmax_weight(powers, V::load(s + t.queries), maximum) : V::fill(0.0f);
  const __m512i both = pair_up(even, odd);
  _mm512_store_si512(t.pairs + key / 2 * t.queries + column, both);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(both),
                          reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80)));  // (1, 1)
}

DK_LANES_TARGET bool softmax_pairs(const SoftmaxTile& t) {
  for (int64_t column = 0; column < t.queries; column += V::kWidth) {
    const V::Lanes maximum = softmax_maximum(t, column);
    V::Lanes sums[2] = {V::fill(0.0f), V::fill(0.0f)};
    int64_t key = 0;
    for (; key + 4 <= t.keys; key += 4) {
      sums[0] = weigh_pair(t, key, column, maximum, sums[0]);
      sums[1] = weigh_pair(t, key + 2, column, maximum, sums[1]);
    }
    for (; key < t.keys; key += 2) sums[0] = weigh_pair(t, key, column, maximum, sums[0]);
    add_to_sum(t, column, V::add(sums[0], sums[1]));
  }
  return factors_differ(t);
}

DK_LANES_TARGET bool softmax(const SoftmaxTile& tile) {
  return tile.pairs != nullptr ? softmax_pairs(tile) : softmax_float(tile);
}

// `Wide` vectors of two queries; of one beside zeros, if `Last`.
template <int Wide, bool Last>
DK_LANES_TARGET inline void softmax_grad_block(const SoftmaxGradTile& t, int64_t i, int64_t j) {
  constexpr int kRows = Last ? 1 : 2;
  const V::Lanes minus_scale = V::fill(-t.scale);
  V::Lanes p[2][Wide], ds[2][Wide];
  for (int row = 0; row < 2; ++row) {
    for (int w = 0; w < Wide; ++w) p[row][w] = ds[row][w] = V::fill(0.0f);
  }
  for (int row = 0; row < kRows; ++row) {
    const V::Lanes offset = V::fill(t.offset[i + row]), delta = V::fill(t.delta[i + row]);
    for (int w = 0; w < Wide; ++w) {
      const int64_t at = (i + row) * t.keys + j + w * V::kWidth;
      p[row][w] = coarse_exp2(power_below(V::fma(V::load(t.logits + at), minus_scale, offset)));
      ds[row][w] = softmax_gradient(V(), p[row][w], V::load(t.dp + at), delta);
    }
    Pair* to = t.ds_rows + ((i + row) * t.keys + j) / 2;
    if constexpr (Wide == 2) {
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(ds[row][1], ds[row][0])));
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(ds[row][0])));
    }
  }
  for (int w = 0; w < Wide; ++w) {
    const int64_t at = (i / 2) * t.keys + j + w * V::kWidth;
    _mm512_store_si512(t.weight_pairs + at, pair_up(p[0][w], p[1][w]));
    _mm512_store_si512(t.ds_pairs + at, pair_up(ds[0][w], ds[1][w]));
  }
}

template <bool Last>
DK_LANES_TARGET inline void softmax_grad_rows(const SoftmaxGradTile& t, int64_t i) {
  int64_t j = 0;
  for (; j + 2 * V::kWidth <= t.keys; j += 2 * V::kWidth) softmax_grad_block<2, Last>(t, i, j);
  if (j < t.keys) softmax_grad_block<1, Last>(t, i, j);
}

DK_LANES_TARGET void softmax_grad_pairs(const SoftmaxGradTile& t) {
  int64_t i = 0;
  for (; i + 2 <= t.queries; i += 2) softmax_grad_rows<false>(t, i);
  if (i < t.queries) softmax_grad_rows<true>(t, i);
}

DK_LANES_TARGET void softmax_grad(const SoftmaxGradTile& tile) {
  return tile.weight_pairs != nullptr ? softmax_grad_pairs(tile) : softmax_grad_float(tile);
}

DK_LANES_TARGET void dot_columns_pairs(const Pair* a, const Pair* b, int64_t rows, int64_t columns, float* sum) {
  dots<PairProduct>(a, b, rows, columns, sum);
}

}  // namespace

const AttentionTiles kAvx512Bf16Tiles{"avx512",      kLanes,       multiply,    multiply_pairs, softmax,
                                      scale_columns, softmax_grad, weight_sums, dot_columns,    dot_columns_pairs,
                                      kRowKernels};
}  // namespace dk::cpu
#endif
