// The CPU kernels behind the same C functions as the CUDA launchers in launch.cu.
#include <core/cpu.h>

#include "flat.h"

namespace {

template <class Args>
int64_t all_blocks(const Args& args) {
  return args.space.count == 0 ? 0 : args.space.batch * dk::cpu::blocks_per_sample(args.space);
}
void run(const dk::RandnArgs& args) { dk::cpu::randn(args, 0, all_blocks(args)); }
void run(const dk::NoiseSumArgs& args) { dk::cpu::noise_sum(args, 0, all_blocks(args)); }
void run(const dk::NoisingArgs& args) { dk::cpu::noising(args, 0, all_blocks(args)); }
void run(const dk::StepArgs& args) { dk::cpu::step(args, 0, all_blocks(args)); }
void run(const dk::LearnedStepArgs& args) { dk::cpu::learned_step(args, 0, all_blocks(args)); }
void run(const dk::LossArgs& args) {
  dk::cpu::loss(args, 0, all_blocks(args));
  dk::cpu::loss_finish(args);
}
void run(const dk::VariationalArgs& args) {
  dk::cpu::variational(args, 0, all_blocks(args));
  dk::cpu::variational_finish(args);
}
void run(const dk::StepLogprobArgs& args) {
  dk::cpu::step_logprob(args, 0, all_blocks(args));
  dk::cpu::step_logprob_finish(args);
}

void run(const dk::QuantileArgs& args) {
  for (int64_t phase = 0; phase < dk::cpu::quantile_phases(args); ++phase) {
    dk::cpu::quantile(args, phase, 0, dk::cpu::quantile_tasks(args, phase));
  }
}
void run(const dk::MomentsArgs& args) {
  for (int64_t phase = 0; phase < dk::cpu::moments_phases(args.space); ++phase) {
    dk::cpu::moments(args, phase, 0, dk::cpu::moments_tasks(args.space, phase));
  }
}

template <class Phases, class Tasks, class Kernel>
void run(const dk::GroupNormArgs& args, const Phases& phases, const Tasks& tasks, const Kernel& kernel) {
  for (int64_t phase = 0; phase < phases(args.problem); ++phase) kernel(args, phase, 0, tasks(args.problem, phase));
}
void run(const dk::GroupNormArgs& args) {  // a gradient that comes in makes it the backward pass
  using namespace dk::cpu;
  if (args.grad_out.data == nullptr) {
    run(args, group_norm_phases, group_norm_tasks, group_norm);
  } else {
    run(args, group_norm_grad_phases, group_norm_grad_tasks, group_norm_grad);
  }
}

void run(const dk::LinearRowsArgs& args) {
  using namespace dk::cpu;
  for (int64_t phase = 0; phase < linear_rows_phases(args); ++phase) {
    linear_rows(args, phase, 0, linear_rows_tasks(args, phase));
  }
}

}  // namespace

#define DEFINE(NAME)                          \
  extern "C" int dk_##NAME(FLAT_PARAMETERS) { \
    run(flat::NAME(FLAT_ARGUMENTS));          \
    return 0;                                 \
  }
FLAT_OPS(DEFINE)

extern "C" const char* dk_isa() { return dk::cpu::isa_name(); }

extern "C" int64_t dk_quantile_workspace(int64_t batch, int64_t count) {
  dk::Space space{};
  space.batch = batch;
  space.count = count;
  return dk::cpu::quantile_workspace(space);
}
