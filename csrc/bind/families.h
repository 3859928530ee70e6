// All ops, once: a family is a template over a backend with
//   static void define(StableLibrary&)     the schemas
//   static void implement(StableLibrary&)  the functions behind them; the boxing layer compares only the number of
//                                          arguments, so tests/ops/test_schemas.py calls every op with all of them
//                                          distinct
//   static Table table()                   if it reads a table of its own
// and checks, describes and runs a call in terms of the backend, CpuBackend (ops_cpu.cpp) or CudaBackend
// (ops_cuda.cpp):
//   kHost               tables and indices are read here, not on the device
//   kMaxChannels        largest C with a channels_last path that draws noise
//   check(op, operand)  is this its device?
// with run, run_phase and over on the host, launch and capability on a device.
#pragma once

#include "attention.h"
#include "conv3x3.h"
#include "group_norm.h"
#include "learned_step.h"
#include "linear_rows.h"
#include "loss.h"
#include "noise_sum.h"
#include "noising.h"
#include "randn.h"
#include "statistics.h"
#include "step.h"
#include "step_logprob.h"
#include "variational.h"

namespace dk::bind {

template <class Backend, class Use>
void for_each_family(const Use& use) {
  use(RandnOps<Backend>());
  use(NoiseSumOps<Backend>());
  use(NoisingOps<Backend>());
  use(LossOps<Backend>());
  use(VariationalOps<Backend>());
  use(StepOps<Backend>());
  use(LearnedStepOps<Backend>());
  use(StepLogprobOps<Backend>());
  use(StatisticsOps<Backend>());
  use(AttentionOps<Backend>());
  use(GroupNormOps<Backend>());
  use(LinearRowsOps<Backend>());
  if constexpr (Backend::kHost) use(Conv3x3Ops<Backend>());
}

}  // namespace dk::bind
