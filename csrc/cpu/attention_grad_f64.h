// Attention in float64, backward: plain loops, for gradcheck. In phase 0 a task is one query (dQ and delta), in phase 1
// one key (dK and dV).
#pragma once

#include "../core/attention.h"

namespace dk::cpu {

constexpr int64_t kGradPhasesF64 = 2;
int64_t attention_grad_f64_workspace(const AttentionProblem& problem);
int64_t attention_grad_f64_tasks(const AttentionProblem& problem, int64_t phase);
void attention_grad_f64(const AttentionGradArgs& args, int64_t phase, int64_t begin, int64_t end);

}  // namespace dk::cpu
