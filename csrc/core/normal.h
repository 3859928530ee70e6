// Two standard normals from two random words (Box and Muller 1958), in a fixed sequence of correctly rounded float32
// operations, so that every device gives the same bits.
//
//   u = (r_even + 1/2) 2^-32,  angle = 2 pi r_odd 2^-32,  R = sqrt(-2 ln u),  (R cos angle, R sin angle)
//
// The angle is reduced to a quadrant k and |t| <= pi/4 in integers, which is exact. The polynomials are minimax fits
// made by tools/fit_normal_polynomials.py; each lane is within 4 ulp of the exact function of the rounded u and t.
#pragma once

#include "arith.h"

namespace dk {

// ln u for u in [2^-33, 1]: u = 2^e (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1), ln(1 + f) = f + f^2 P(f).
DK_HD float log_unit(float u) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t shifted = float_bits(u) - kSqrtHalf;
  const float e = to_float(static_cast<int32_t>(shifted) >> 23);
  const float f = sub(bits_float((shifted & 0x007fffffu) + kSqrtHalf), 1.0f);
  float p = 0.0873768106f;
  p = fma(p, f, -0.143071741f);
  p = fma(p, f, 0.149165004f);
  p = fma(p, f, -0.165703952f);
  p = fma(p, f, 0.199622348f);
  p = fma(p, f, -0.250017732f);
  p = fma(p, f, 0.333339453f);
  p = fma(p, f, -0.499999911f);
  const float log1p = fma(mul(f, f), p, f);
  return fma(e, 0.693147181f, log1p);
}

struct Pair {
  float a, b;
};

DK_HD Pair normal_pair(uint32_t r_even, uint32_t r_odd) {
  const float u = fma(to_float(r_even), 2.32830644e-10f, 1.16415322e-10f);  // 2^-32, 2^-33
  const float radius = sqrt(mul(-2.0f, log_unit(u)));

  const uint32_t k = (r_odd + 0x20000000u) >> 30;
  const float t = mul(to_float(static_cast<int32_t>(r_odd - (k << 30))), 1.46291808e-9f);  // 2 pi 2^-32
  const float z = mul(t, t);
  float s = fma(-0.000195182918f, z, 0.00833218917f);
  s = fma(s, z, -0.166666552f);
  const float sin_t = fma(mul(z, t), s, t);
  float c = fma(2.44323273e-05f, z, -0.00138873095f);
  c = fma(c, z, 0.0416666456f);
  c = fma(c, z, -0.5f);
  const float cos_t = fma(c, z, 1.0f);

  // cos(k pi/2 + t), sin(k pi/2 + t) for k = 0..3: (c, s), (-s, c), (-c, -s), (s, -c)
  const uint32_t swap = 0u - (k & 1u), bits_s = float_bits(sin_t), bits_c = float_bits(cos_t);
  const uint32_t cosine = ((bits_c & ~swap) | (bits_s & swap)) ^ (((k + 1u) << 30) & 0x80000000u);
  const uint32_t sine = ((bits_s & ~swap) | (bits_c & swap)) ^ ((k << 30) & 0x80000000u);
  return {mul(radius, bits_float(cosine)), mul(radius, bits_float(sine))};
}

}  // namespace dk
