// Correctly rounded float and double arithmetic, the same on every compiler and device.
//
// Bit-exact formulas are written with dk::mul / add / sub / fma / sqrt and nothing else: on the device they become the
// `.rn` instructions that ptxas may not fuse, on the host -ffp-contract=off keeps g++ from fusing them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DK_HD __host__ __device__ __forceinline__
#else
#define DK_HD inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define DK_RN(device, host) return device
#else
#define DK_RN(device, host) return host
#endif

namespace dk {

DK_HD float mul(float a, float b) { DK_RN(__fmul_rn(a, b), a * b); }
DK_HD float add(float a, float b) { DK_RN(__fadd_rn(a, b), a + b); }
DK_HD float sub(float a, float b) { DK_RN(__fadd_rn(a, -b), a - b); }
DK_HD float fma(float a, float b, float c) { DK_RN(__fmaf_rn(a, b, c), __builtin_fmaf(a, b, c)); }
DK_HD float div(float a, float b) { DK_RN(__fdiv_rn(a, b), a / b); }
DK_HD float sqrt(float a) { DK_RN(__fsqrt_rn(a), __builtin_sqrtf(a)); }

DK_HD double mul(double a, double b) { DK_RN(__dmul_rn(a, b), a * b); }
DK_HD double add(double a, double b) { DK_RN(__dadd_rn(a, b), a + b); }
DK_HD double sub(double a, double b) { DK_RN(__dadd_rn(a, -b), a - b); }
DK_HD double fma(double a, double b, double c) { DK_RN(__fma_rn(a, b, c), __builtin_fma(a, b, c)); }
DK_HD double div(double a, double b) { DK_RN(__ddiv_rn(a, b), a / b); }
DK_HD double sqrt(double a) { DK_RN(__dsqrt_rn(a), __builtin_sqrt(a)); }

// Integer -> float32, rounded to nearest even.
DK_HD float to_float(uint32_t a) { DK_RN(__uint2float_rn(a), static_cast<float>(a)); }
DK_HD float to_float(int32_t a) { DK_RN(__int2float_rn(a), static_cast<float>(a)); }

DK_HD uint32_t float_bits(float a) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(a);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

DK_HD float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

DK_HD uint64_t double_bits(double a) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(__double_as_longlong(a));
#else
  uint64_t bits;
  __builtin_memcpy(&bits, &a, sizeof bits);
  return bits;
#endif
}

DK_HD double bits_double(uint64_t bits) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(static_cast<long long>(bits));
#else
  double a;
  __builtin_memcpy(&a, &bits, sizeof a);
  return a;
#endif
}

template <class T>
DK_HD T not_a_number() {
  return static_cast<T>(bits_float(0x7fc00000u));
}

}  // namespace dk
