// The inner loops of attention for AVX-512 (F, DQ, BW, VL).
#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12's own intrinsics (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "targets.h"

#define DK_LANES_TARGET DK_AVX512

#include "attention_avx512.h"
#include "attention_grad_lanes.h"
#include "attention_rows_lanes.h"

namespace dk::cpu {
const AttentionTiles kAvx512Tiles{"avx512",           kLanes,      multiply,    nullptr, softmax_float, scale_columns,
                                  softmax_grad_float, weight_sums, dot_columns, nullptr, kRowKernels};
}  // namespace dk::cpu
#endif
