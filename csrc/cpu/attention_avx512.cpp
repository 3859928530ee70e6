// The inner loops of attention for AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12's own intrinsics (GCC bug 105593)
#endif
#define DK_LANES_TARGET \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512")))

#include "attention_avx512.h"

#include "attention_grad_lanes.h"

namespace dk::cpu {
const AttentionTiles kAvx512Tiles{"avx512",           multiply,    nullptr,     softmax_float, scale_columns,
                                  softmax_grad_float, weight_sums, dot_columns, nullptr};
}  // namespace dk::cpu
#endif
