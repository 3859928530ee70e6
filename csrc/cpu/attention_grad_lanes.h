// The inner loops of attention's backward pass beside the products, over the same V as attention_lanes.h.
#pragma once

#include "attention_lanes.h"

namespace dk::cpu {
namespace {

// The power of 2 of P, from how far a logit is `below` the log-sum-exp. P is at most 1, which a large log-sum-exp,
// being rounded, would not keep.
DK_LANES_TARGET inline V::Lanes power_below(V::Lanes below) {
  const V::Lanes zero = V::fill(0.0f);
  return V::sub(zero, V::max(zero, below));
}

// P of the vector of keys from j on.
DK_LANES_TARGET inline V::Lanes weights(const SoftmaxGradTile& t, int64_t i, int64_t j) {
  const V::Lanes below = V::fma(V::load(t.logits + i * t.keys + j), V::fill(-t.scale), V::fill(t.offset[i]));
  return exp2(power_below(V::add(below, V::fill(t.offset_low[i]))));
}

DK_LANES_TARGET void softmax_grad_float(const SoftmaxGradTile& t) {
  for (int64_t i = 0; i < t.queries; ++i) {
    const V::Lanes delta = V::fill(t.delta[i]);
    for (int64_t j = 0; j < t.keys; j += V::kWidth) {
      const V::Lanes p = weights(t, i, j);
      float* dp = t.dp + i * t.keys + j;
      V::store(t.logits + i * t.keys + j, p);
      V::store(dp, softmax_gradient(V(), p, V::load(dp), delta));
    }
  }
}

DK_LANES_TARGET void weight_sums(const SoftmaxGradTile& t, int64_t keys, double* sum) {
  constexpr int kWidth = V::kWidth;
  for (int64_t i = 0; i < t.queries; ++i) {
    alignas(64) float lanes[kWidth];
    V::Lanes total = V::fill(0.0f);
    int64_t j = 0;
    for (; j + kWidth <= keys; j += kWidth) total = V::add(total, weights(t, i, j));
    V::store(lanes, total);
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    sum[i] += static_cast<double>(lanes[0]);
    if (j == keys) continue;
    V::store(lanes, weights(t, i, j));
    for (int64_t lane = 0; lane < keys - j; ++lane) sum[i] += static_cast<double>(lanes[lane]);
  }
}

template <class P>
DK_LANES_TARGET void dots(const typename P::Element* a, const typename P::Element* b, int64_t rows, int64_t columns,
                          float* sum) {
  for (int64_t j = 0; j < columns; j += V::kWidth) {
    V::Lanes total = V::load(sum + j);
    for (int64_t i = 0; i < rows; ++i) {
      total = P::fma(P::load(a + i * columns + j), P::load(b + i * columns + j), total);
    }
    V::store(sum + j, total);
  }
}

DK_LANES_TARGET void dot_columns(const float* a, const float* b, int64_t rows, int64_t columns, float* sum) {
  dots<FloatProduct>(a, b, rows, columns, sum);
}

}  // namespace
}  // namespace dk::cpu
