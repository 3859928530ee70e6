// The dtypes of stored tensors, and their scalar conversions to and from float32 (round to nearest even, as torch).
#pragma once

#include "arith.h"

namespace dk {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

// The dtypes of floating-point tensors, once: DTYPE(name here, type of an element, torch's name).
#define DK_STORED_DTYPES(DTYPE) \
  DTYPE(f64, double, float64)   \
  DTYPE(f32, float, float32)    \
  DTYPE(f16, Half, float16)     \
  DTYPE(bf16, Bfloat16, bfloat16)

#define DK_NAME(NAME, TYPE, TORCH) NAME,
enum class Dtype : int32_t { DK_STORED_DTYPES(DK_NAME) u8 };  // u8: masks only (bool and uint8)
#undef DK_NAME

DK_HD constexpr int size_of(Dtype d) {
  switch (d) {
#define DK_SIZE(NAME, TYPE, TORCH) \
  case Dtype::NAME:                \
    return sizeof(TYPE);
    DK_STORED_DTYPES(DK_SIZE)
#undef DK_SIZE
    default:
      return 1;
  }
}

DK_HD float widen(Bfloat16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

DK_HD Bfloat16 narrow_bf16(float v) {
  const uint32_t bits = float_bits(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

// Host only: the device has instructions for float16.
inline float widen(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1fu, mantissa = v.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-08f;
    return bits_float(sign | float_bits(magnitude));
  }
  if (exponent == 31) {  // infinity, or NaN made quiet as the hardware does
    return bits_float(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

inline Half narrow_f16(float v) {
  const uint32_t bits = float_bits(v), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u | ((magnitude >> 13) & 0x3ffu);  // NaN keeps its payload, as the hardware does
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;  // rounds to infinity
  } else if (magnitude >= 0x38800000u) {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  } else {  // subnormal: adding 1/2 leaves mantissa 2^-24, rounded, in the low bits
    result = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | result)};
}

// The same by the type of an element, for loops over any dtype: T is float or double, and double goes to a narrow dtype
// through float, on every device.
DK_HD double widen(double v) { return v; }
DK_HD float widen(float v) { return v; }
DK_HD float widen(uint8_t v) { return v ? 1.0f : 0.0f; }

template <class T>
DK_HD void narrow(T v, double& out) {
  out = v;
}
template <class T>
DK_HD void narrow(T v, float& out) {
  out = static_cast<float>(v);
}
template <class T>
DK_HD void narrow(T v, Bfloat16& out) {
  out = narrow_bf16(static_cast<float>(v));
}
template <class T>
void narrow(T v, Half& out) {
  out = narrow_f16(static_cast<float>(v));
}

}  // namespace dk
