// The inner loops of attention over a vector type V, which a file of an instruction set defines before it includes this
// one, with DK_LANES_TARGET, the attribute of every function here:
//   V::Lanes, V::kWidth floats of them; load, store (aligned), fill, add, sub, mul, max, fma
//   V::max(a, b): b where a or b is NaN
//   V::fraction(x) = x - floor(x); anything but NaN for -infinity, NaN for NaN
//   V::times_power(p, x) = p 2^floor(x) for p in [1, 2] and x < 127: 0 for -infinity, NaN where p is NaN
//   V::kWide: vectors of a row that a product keeps in registers for kTileRows rows
#pragma once

#include <limits>

#define DK_SOFTMAX DK_LANES_TARGET inline
#include "../core/softmax.h"
#include "attention_tiles.h"

namespace dk::cpu {
namespace {

constexpr int kTileRows = 6;

// 2^x: exactly 1 for 0, else within 0.6 units in the last place (the polynomial within 2.0e-9 on [0, 1]).
DK_LANES_TARGET inline V::Lanes exp2(V::Lanes x) {
  const V::Lanes f = V::fraction(x);
  V::Lanes p = V::fma(V::fill(0.00021613015269394964f), f, V::fill(0.0012467820197343826f));
  p = V::fma(p, f, V::fill(0.00967545434832573f));
  p = V::fma(p, f, V::fill(0.055485278367996216f));
  p = V::fma(p, f, V::fill(0.2402293086051941f));
  p = V::fma(p, f, V::fill(0.6931470632553101f));
  p = V::fma(p, f, V::fill(1.0f));
  return V::times_power(p, x);
}

// 2^x within 8.6e-5 of itself, exactly 1 for 0: for weights that are then rounded to bfloat16, 23 times as coarse.
DK_LANES_TARGET inline V::Lanes coarse_exp2(V::Lanes x) {
  const V::Lanes f = V::fraction(x);
  V::Lanes p = V::fma(V::fill(0.07706772536039352f), f, V::fill(0.22764424979686737f));
  p = V::fma(p, f, V::fill(0.6951169371604919f));
  p = V::fma(p, f, V::fill(1.0f));
  return V::times_power(p, x);
}

// The arithmetic of core/softmax.h. `scale`: of the logits, times log2(e). Maxima begin with the lowest float, so that
// every one is finite.
struct Powers : V {
  V::Lanes scale;
  DK_LANES_TARGET explicit Powers(float factor) : scale(V::fill(factor)) {}
  DK_LANES_TARGET static V::Lanes base(V::Lanes maximum) { return maximum; }
  DK_LANES_TARGET V::Lanes power(V::Lanes x) const { return exp2(V::mul(x, scale)); }
};
struct CoarsePowers : Powers {
  using Powers::Powers;
  DK_LANES_TARGET V::Lanes power(V::Lanes x) const { return coarse_exp2(V::mul(x, scale)); }
};

struct FloatProduct {
  using Element = float;
  using Operand = V::Lanes;
  DK_LANES_TARGET static Operand load(const float* b) { return V::load(b); }
  DK_LANES_TARGET static Operand fill(const float* a) { return V::fill(*a); }
  DK_LANES_TARGET static V::Lanes fma(Operand a, Operand b, V::Lanes c) { return V::fma(a, b, c); }
};

// `Rows` rows and `Wide` vectors of c, all in registers.
template <class P, int Rows, int Wide>
DK_LANES_TARGET inline void product_block(const TileProduct<typename P::Element>& t, int64_t row, int64_t column) {
  V::Lanes sum[Rows][Wide];
  float* c = t.c + row * t.c_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) {
      sum[r][j] = V::fill(0.0f);
    }
  }
  const typename P::Element* a = t.a + row * t.a_row;
  const typename P::Element* b = t.b + column;
  const int64_t a_row = t.a_row, a_depth = t.a_depth, b_row = t.b_row;
  for (int64_t k = t.depth; k > 0; --k, a += a_depth, b += b_row) {
    typename P::Operand right[Wide];
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) right[j] = P::load(b + j * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const typename P::Operand left = P::fill(a + r * a_row);
#pragma GCC unroll 4
      for (int j = 0; j < Wide; ++j) sum[r][j] = P::fma(left, right[j], sum[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < Wide; ++j) {
      float* at = c + r * t.c_row + j * V::kWidth;
      V::store(at, t.accumulate ? V::add(V::load(at), sum[r][j]) : sum[r][j]);
    }
  }
}

template <class P, int Wide>
DK_LANES_TARGET void product_columns(const TileProduct<typename P::Element>& t, int64_t column) {
  // Blocks of nearly equal height: a last block of one row would wait for its own sums.
  int64_t blocks = (t.rows + kTileRows - 1) / kTileRows;
  for (int64_t row = 0, height; row < t.rows; row += height, --blocks) {
    height = (t.rows - row + blocks - 1) / blocks;
    switch (height) {
      case 1:
        product_block<P, 1, Wide>(t, row, column);
        break;
      case 2:
        product_block<P, 2, Wide>(t, row, column);
        break;
      case 3:
        product_block<P, 3, Wide>(t, row, column);
        break;
      case 4:
        product_block<P, 4, Wide>(t, row, column);
        break;
      case 5:
        product_block<P, 5, Wide>(t, row, column);
        break;
      default:
        product_block<P, 6, Wide>(t, row, column);
    }
  }
}

template <class P>
DK_LANES_TARGET void product(const TileProduct<typename P::Element>& whole) {
  TileProduct<typename P::Element> t = whole;
  int64_t parts = (whole.depth + whole.chain - 1) / whole.chain;
  for (int64_t left = whole.depth; left > 0; left -= t.depth, --parts) {
    t.depth = (left + parts - 1) / parts;
    int64_t column = 0;
    for (; column + V::kWide * V::kWidth <= t.columns; column += V::kWide * V::kWidth) {
      product_columns<P, V::kWide>(t, column);
    }
    if constexpr (V::kWide == 4) {
      const int64_t rest = (t.columns - column) / V::kWidth;
      if (rest == 3) product_columns<P, 3>(t, column);
      if (rest == 2) product_columns<P, 2>(t, column);
      if (rest == 1) product_columns<P, 1>(t, column);
    } else if (column < t.columns) {
      product_columns<P, 1>(t, column);
    }
    t.a += t.depth * t.a_depth;
    t.b += t.depth * t.b_row;
    t.accumulate = true;
  }
}
static_assert(V::kWide == 4 || V::kWide == 2, "no columns are left over");

constexpr int64_t kLanes = V::kWidth < kTileLanes ? V::kWidth : kTileLanes;

DK_LANES_TARGET void multiply(const TileProduct<float>& tile) { product<FloatProduct>(tile); }

// The running maximum of one vector of queries: sets `maximum` and `factor`, returns the former.
DK_LANES_TARGET inline V::Lanes softmax_maximum(const SoftmaxTile& t, int64_t column) {
  const float* s = t.logits + column;
  V::Lanes top[4];
  for (V::Lanes& lane : top) lane = V::fill(std::numeric_limits<float>::lowest());
  int64_t key = 0;
  for (; key + 4 <= t.keys; key += 4) {
    for (int j = 0; j < 4; ++j) top[j] = V::max(V::load(s + (key + j) * t.queries), top[j]);
  }
  for (; key < t.keys; ++key) top[0] = V::max(V::load(s + key * t.queries), top[0]);
  const V::Lanes here = V::max(V::max(top[0], top[1]), V::max(top[2], top[3]));
  V::Lanes now = V::load(t.maximum + column), base;
  V::store(t.factor + column, softmax_advance(Powers(t.scale), now, here, base));
  V::store(t.maximum + column, now);
  return now;
}

DK_LANES_TARGET bool factors_differ(const SoftmaxTile& t) {
  bool differ = false;
  for (int64_t j = 0; j < t.queries; ++j) differ |= !(t.factor[j] == 1.0f);
  return differ;
}

// Adds the weights of a tile to the running sum of one vector of queries.
DK_LANES_TARGET inline void add_to_sum(const SoftmaxTile& t, int64_t column, V::Lanes sum) {
  float* at = t.sum + column;
  V::store(at, softmax_sum(V(), V::load(at), V::load(t.factor + column), sum));
}

// The weight of one logit replaces it; returns the sum with it.
DK_LANES_TARGET inline V::Lanes weigh(float* logit, const Powers& powers, V::Lanes maximum, V::Lanes sum) {
  const V::Lanes weight = softmax_weight(powers, V::load(logit), maximum);
  V::store(logit, weight);
  return V::add(sum, weight);
}

DK_LANES_TARGET bool softmax_float(const SoftmaxTile& t) {
  for (int64_t column = 0; column < t.queries; column += V::kWidth) {
    const V::Lanes maximum = softmax_maximum(t, column);
    const Powers powers(t.scale);
    float* s = t.logits + column;
    V::Lanes sums[4] = {V::fill(0.0f), V::fill(0.0f), V::fill(0.0f), V::fill(0.0f)};
    int64_t key = 0;
    for (; key + 4 <= t.keys; key += 4) {
      for (int j = 0; j < 4; ++j) sums[j] = weigh(s + (key + j) * t.queries, powers, maximum, sums[j]);
    }
    for (; key < t.keys; ++key) sums[0] = weigh(s + key * t.queries, powers, maximum, sums[0]);
    add_to_sum(t, column, V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3])));
  }
  return factors_differ(t);
}

DK_LANES_TARGET void scale_columns(float* c, int64_t c_row, int64_t rows, int64_t columns, const float* factor) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = c + i * c_row;
    for (int64_t j = 0; j < columns; j += V::kWidth) {
      V::store(row + j, V::mul(V::load(row + j), V::load(factor + j)));
    }
  }
}

}  // namespace
}  // namespace dk::cpu
