#pragma once

#include "../core/attention.h"

namespace dk::cpu {

// attention() in float64: for gradcheck, so the plain formula and no micro-kernel. Tasks of `tile` queries.
void attention_f64(const AttentionArgs& args, int64_t begin, int64_t end, int64_t tile);

}  // namespace dk::cpu
