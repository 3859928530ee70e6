// The level every machine has: no intrinsics, the compiler's baseline target.
#include "spans.h"

namespace dk::cpu {
namespace {

void widen_f16_span(const Half* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}
void narrow_f16_span(const float* in, Half* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrow_f16(in[i]);
}

}  // namespace
}  // namespace dk::cpu

DK_DEFINE_ISA(kScalar, Loops::scalar, , ScalarNoise, widen_f16_span, narrow_f16_span)
