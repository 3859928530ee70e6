// Attention on rows as they lie in memory, for few queries or keys, over the V of attention_lanes.h and further of it:
//   V::loadu (any alignment; also of bfloat16 and float16), V::part: the first eight elements, zeros after them
//   V::storeu, V::store_part likewise
//   V::store_sums(p, a, b, c, d): the sum of the lanes of each to p[0 .. 3]
#pragma once

#include "attention_lanes.h"

namespace dk::cpu {
namespace {

// `Rows` rows of a by four of b, of which those from `columns` on are copies of the last.
template <class T, int Rows>
DK_LANES_TARGET inline void dots_block(const RowDots& t, int64_t row, int64_t column) {
  const T* a = static_cast<const T*>(t.a) + row * t.a_row;
  const T* b[4];
  for (int j = 0; j < 4; ++j) {
    const int64_t at = column + j < t.columns ? column + j : t.columns - 1;
    b[j] = static_cast<const T*>(t.b) + at * t.b_row;
  }
  V::Lanes sum[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = V::fill(0.0f);
  }
  const int64_t a_row = t.a_row, whole = t.depth / V::kWidth * V::kWidth;
  for (int64_t k = 0; k < whole; k += V::kWidth) {
    V::Lanes right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = V::loadu(b[j] + k);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const V::Lanes left = V::loadu(a + r * a_row + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = V::fma(left, right[j], sum[r][j]);
    }
  }
  if (whole < t.depth) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const V::Lanes left = V::part(a + r * a_row + whole);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = V::fma(left, V::part(b[j] + whole), sum[r][j]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    V::store_sums(t.c + (row + r) * t.c_row + column, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
  }
}

template <class T>
DK_LANES_TARGET void dots(const RowDots& t) {
  for (int64_t column = 0; column < t.columns; column += 4) {  // each row of b is fetched once
    int64_t row = 0;
    for (; row + V::kWide <= t.rows; row += V::kWide) dots_block<T, V::kWide>(t, row, column);
    for (; row < t.rows; ++row) dots_block<T, 1>(t, row, column);
  }
}

DK_LANES_TARGET void dot_rows(const RowDots& t) {
  if (t.dtype == Dtype::f16) return dots<Half>(t);
  if (t.dtype == Dtype::bf16) return dots<Bfloat16>(t);
  return dots<float>(t);
}

// `Rows` rows of c and `Wide` vectors of them, in two chains over the even and the odd rows of v.
template <class T, int Rows, int Wide, bool Part>
DK_LANES_TARGET inline void mix_block(const RowMix& t, int64_t row, int64_t column) {
  V::Lanes sum[2][Rows][Wide];
#pragma GCC unroll 2
  for (int chain = 0; chain < 2; ++chain) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) sum[chain][r][j] = V::fill(0.0f);
    }
  }
  const float* w = t.w + row * t.w_row;
  const T* v = static_cast<const T*>(t.v) + column;
  for (int64_t key = 0; key < t.depth; key += 2) {
#pragma GCC unroll 2
    for (int chain = 0; chain < 2; ++chain) {
      if (chain == 1 && key + 1 == t.depth) break;
      V::Lanes right[Wide];
      const T* from = v + (key + chain) * t.v_row;
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) right[j] = Part ? V::part(from) : V::loadu(from + j * V::kWidth);
#pragma GCC unroll 2
      for (int r = 0; r < Rows; ++r) {
        const V::Lanes left = V::fill(w[r * t.w_row + (key + chain) * t.w_depth]);
#pragma GCC unroll 4
        for (int j = 0; j < Wide; ++j) sum[chain][r][j] = V::fma(left, right[j], sum[chain][r][j]);
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) {
      float* at = t.c + (row + r) * t.c_row + column + j * V::kWidth;
      V::Lanes both = t.depth > 1 ? V::add(sum[0][r][j], sum[1][r][j]) : sum[0][r][j];
      if (t.accumulate) both = V::add(Part ? V::part(at) : V::loadu(at), both);
      if (t.factor != nullptr) both = V::mul(both, V::fill(t.factor[row + r]));
      Part ? V::store_part(at, both) : V::storeu(at, both);
    }
  }
}

// One block of these rows from `column` on; returns its columns.
template <class T, int Rows>
DK_LANES_TARGET inline int64_t mix_some(const RowMix& t, int64_t row, int64_t column) {
  const int64_t left = t.columns - column;
  if (left >= V::kWide * V::kWidth) {
    mix_block<T, Rows, V::kWide, false>(t, row, column);
    return V::kWide * V::kWidth;
  }
  if (left >= V::kWidth) {
    mix_block<T, Rows, 1, false>(t, row, column);
  } else {
    mix_block<T, Rows, 1, true>(t, row, column);
  }
  return V::kWidth;
}

template <class T>
DK_LANES_TARGET void mix(const RowMix& t) {
  constexpr int64_t kFewKeys = 8;
  const int64_t pairs = t.rows / 2 * 2;
  int64_t some = 0;
  if (t.depth <= kFewKeys) {  // v stays in the L1 cache, and c is written from front to back
    for (int64_t row = 0; row < pairs; row += 2) {
      for (int64_t column = 0; column < t.columns; column += some) some = mix_some<T, 2>(t, row, column);
    }
    for (int64_t column = 0; pairs < t.rows && column < t.columns; column += some) {
      some = mix_some<T, 1>(t, pairs, column);
    }
    return;
  }
  for (int64_t column = 0; column < t.columns; column += some) {  // each element of v is fetched once
    for (int64_t row = 0; row < pairs; row += 2) some = mix_some<T, 2>(t, row, column);
    if (pairs < t.rows) some = mix_some<T, 1>(t, pairs, column);
  }
}

DK_LANES_TARGET void mix_rows(const RowMix& t) {
  if (t.dtype == Dtype::f16) return mix<Half>(t);
  if (t.dtype == Dtype::bf16) return mix<Bfloat16>(t);
  return mix<float>(t);
}

// As softmax_float of attention_lanes.h, with the keys of a query on the lanes.
DK_LANES_TARGET inline bool softmax_row(float* s, int64_t keys, float scale, float* maximum, float* sum,
                                        float* factor) {
  const int64_t padded = (keys + V::kWidth - 1) / V::kWidth * V::kWidth;
  for (int64_t key = keys; key < padded; ++key) s[key] = std::numeric_limits<float>::lowest();
  V::Lanes top = V::fill(std::numeric_limits<float>::lowest());
  for (int64_t key = 0; key < padded; key += V::kWidth) top = V::max(V::load(s + key), top);
  alignas(64) float lanes[V::kWidth];
  V::store(lanes, top);
  for (int k = 1; k < V::kWidth; ++k) lanes[0] = lanes[k] > lanes[0] ? lanes[k] : lanes[0];
  const Powers powers(scale);
  V::Lanes now = V::fill(*maximum), base;
  const V::Lanes f = softmax_advance(powers, now, V::fill(lanes[0]), base);
  for (int64_t key = 0; key < padded; key += V::kWidth) {
    V::store(s + key, softmax_weight(powers, V::load(s + key), base));
  }
  for (int64_t key = keys; key < padded; ++key) s[key] = 0.0f;
  V::Lanes total = V::fill(0.0f);
  for (int64_t key = 0; key < padded; key += V::kWidth) total = V::add(total, V::load(s + key));
  float four[4];
  V::store_sums(four, total, now, f, f);
  V::store(lanes, now);
  *maximum = lanes[0];
  V::store(lanes, f);
  *factor = lanes[0];
  *sum = softmax_sum(SoftmaxScalars(), *sum, *factor, four[0]);
  return !(*factor == 1.0f);
}

DK_LANES_TARGET bool softmax_rows(const SoftmaxRows& t) {
  bool differ = false;
  for (int64_t i = 0; i < t.queries; ++i) {
    differ |= softmax_row(t.logits + i * t.row, t.keys, t.scale, t.maximum + i, t.sum + i, t.factor + i);
  }
  return differ;
}

DK_LANES_TARGET void scale_rows(float* c, int64_t c_row, int64_t rows, int64_t columns, const float* factor) {
  for (int64_t i = 0; i < rows; ++i) {
    const V::Lanes f = V::fill(factor[i]);
    float* row = c + i * c_row;
    int64_t j = 0;
    for (; j + V::kWidth <= columns; j += V::kWidth) V::storeu(row + j, V::mul(V::loadu(row + j), f));
    if (j < columns) V::store_part(row + j, V::mul(V::part(row + j), f));
  }
}

constexpr RowKernels kRowKernels{V::kWidth == 16 ? 12 : 8, dot_rows, mix_rows, softmax_rows, scale_rows};

}  // namespace
}  // namespace dk::cpu
