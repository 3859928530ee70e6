// Winograd's matrices along one axis, as additions: input() is B^T d, output() A^T s, weight() G g (core/conv3x3.h).
#pragma once

#include "../core/conv3x3.h"
#include "targets.h"

namespace dk::cpu {

struct WinogradF2 {
  static constexpr ConvForm kForm = ConvForm::f2;
  static DK_BODY void input(const float* d, float* v) {
    v[0] = sub(d[0], d[2]);
    v[1] = add(d[1], d[2]);
    v[2] = sub(d[2], d[1]);
    v[3] = sub(d[1], d[3]);
  }
  static DK_BODY void output(const float* s, float* y) {
    y[0] = add(add(s[0], s[1]), s[2]);
    y[1] = sub(sub(s[1], s[2]), s[3]);
  }
  static DK_BODY void weight(const float* g, float* u) {
    const float ends = add(g[0], g[2]);
    u[0] = g[0];
    u[1] = mul(0.5f, add(ends, g[1]));
    u[2] = mul(0.5f, sub(ends, g[1]));
    u[3] = g[2];
  }
};

// At the points 0, 1, -1, 2, -2 and infinity.
struct WinogradF4 {
  static constexpr ConvForm kForm = ConvForm::f4;
  static DK_BODY void input(const float* d, float* v) {
    const float even = fma(-4.0f, d[2], d[4]), odd = fma(-4.0f, d[1], d[3]);
    const float far = sub(d[4], d[2]), twice = mul(2.0f, sub(d[3], d[1]));
    v[0] = add(fma(4.0f, d[0], mul(-5.0f, d[2])), d[4]);
    v[1] = add(even, odd);
    v[2] = sub(even, odd);
    v[3] = add(far, twice);
    v[4] = sub(far, twice);
    v[5] = add(fma(4.0f, d[1], mul(-5.0f, d[3])), d[5]);
  }
  static DK_BODY void output(const float* s, float* y) {
    const float sum1 = add(s[1], s[2]), difference1 = sub(s[1], s[2]);
    const float sum2 = add(s[3], s[4]), difference2 = sub(s[3], s[4]);
    y[0] = add(add(s[0], sum1), sum2);
    y[1] = fma(2.0f, difference2, difference1);
    y[2] = fma(4.0f, sum2, sum1);
    y[3] = add(fma(8.0f, difference2, difference1), s[5]);
  }
  static DK_BODY void weight(const float* g, float* u) {
    const float ends = add(g[0], g[2]), far = fma(4.0f, g[2], g[0]);
    u[0] = mul(0.25f, g[0]);
    u[1] = mul(-1.0f / 6.0f, add(ends, g[1]));
    u[2] = mul(-1.0f / 6.0f, sub(ends, g[1]));
    u[3] = mul(1.0f / 24.0f, fma(2.0f, g[1], far));
    u[4] = mul(1.0f / 24.0f, fma(-2.0f, g[1], far));
    u[5] = g[2];
  }
};

// F(2, 3) of the tile (a, b, b, c): its third point is b - b, its second 2 b.
struct WinogradUpsampled {
  static constexpr ConvForm kForm = ConvForm::upsampled;
  static DK_BODY void input(const float* d, float* v) {
    v[0] = sub(d[0], d[1]);
    v[1] = d[1];
    v[2] = sub(d[1], d[2]);
  }
  static DK_BODY void output(const float* s, float* y) {
    y[0] = add(s[0], s[1]);
    y[1] = sub(s[1], s[2]);
  }
  static DK_BODY void weight(const float* g, float* u) {
    u[0] = g[0];
    u[1] = add(add(g[0], g[2]), g[1]);
    u[2] = g[2];
  }
};

}  // namespace dk::cpu
