// The ops on CPU tensors: torch's own threads run the blocks.
#include <algorithm>

#include "../core/cpu.h"
#include "attention.h"
#include "learned_step.h"
#include "noise_sum.h"
#include "ops.h"
#include "statistics.h"
#include "step_logprob.h"
#include "variational.h"

namespace dk::bind {
namespace {

// Blocks a thread takes at least: below, waking a second thread costs more than it saves.
constexpr int64_t kGrain = 32, kGrainWithNoise = 16;

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, bool draws) {
  const int64_t blocks = args.space.batch * cpu::blocks_per_sample(args.space);
  const int64_t grain = draws ? kGrainWithNoise : kGrain;
  if (blocks <= grain) return kernel(args, 0, blocks);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

struct CpuBackend {
  static constexpr bool kHost = true;
  static constexpr int64_t kMaxChannels = 16;  // a block of kBlock elements holds long enough runs of a channel

  static void check(const char* op, const Operand& o) {
    if (o.device_type != aoti_torch_device_type_cpu()) fail(op, o.name, " must be on the CPU, got ", device_text(o));
  }
  static void randn(const RandnArgs& args, const Operand&) { run(cpu::randn, args, true); }
  static void noising(const NoisingArgs& args, const Operand&) { run(cpu::noising, args, args.seeds.data != nullptr); }
  static void step(const StepArgs& args, const Operand&, bool draws) { run(cpu::step, args, draws); }
  static void noise_sum(const NoiseSumArgs& args, const Operand&) {
    const int64_t blocks = args.space.batch * cpu::blocks_per_sample(args.space);
    const int64_t grain = std::max<int64_t>(1, kGrainWithNoise / std::max(1, args.terms.n));  // a block is n blocks
    if (blocks <= grain) return cpu::noise_sum(args, 0, blocks);
    torch::stable::parallel_for(0, blocks, grain,
                                [&](int64_t begin, int64_t end) { cpu::noise_sum(args, begin, end); });
  }
  static void loss(const LossArgs& args, const Operand&) {
    run(cpu::loss, args, args.seeds.data != nullptr);
    cpu::loss_finish(args);
  }
  static void learned_step(const LearnedStepArgs& args, const Operand&, bool draws) {
    run(cpu::learned_step, args, draws);
  }
  static void variational(const VariationalArgs& args, const Operand&) {
    run(cpu::variational, args, true);
    cpu::variational_finish(args);
  }
  static void step_logprob(const StepLogprobArgs& args, const Operand&) {
    run(cpu::step_logprob, args, false);
    cpu::step_logprob_finish(args);
  }
};

// The tasks of one phase; a thread takes at least `blocks` blocks' worth of them.
template <class Kernel>
void run_phase(const Space& space, int64_t tasks, int64_t blocks, const Kernel& kernel) {
  const int64_t all = std::max(int64_t{1}, space.batch * cpu::blocks_per_sample(space));
  const int64_t grain = std::max(int64_t{1}, blocks * tasks / all);
  if (tasks <= grain) return kernel(int64_t{0}, tasks);
  torch::stable::parallel_for(0, tasks, grain, kernel);
}

struct CpuStatistics {
  static void check(const char* op, const Operand& o) { CpuBackend::check(op, o); }
  static int64_t quantile_workspace(const Space& space) { return cpu::quantile_workspace(space); }
  static void quantile(const char*, const QuantileArgs& args, const Operand&) {
    for (int64_t phase = 0; phase < cpu::quantile_phases(args); ++phase) {
      run_phase(args.space, cpu::quantile_tasks(args, phase), kGrainWithNoise,
                [&](int64_t begin, int64_t end) { cpu::quantile(args, phase, begin, end); });
    }
  }
  static void moments(const MomentsArgs& args, const Operand&) {
    for (int64_t phase = 0; phase < cpu::moments_phases(args.space); ++phase) {
      run_phase(args.space, cpu::moments_tasks(args.space, phase), kGrain,
                [&](int64_t begin, int64_t end) { cpu::moments(args, phase, begin, end); });
    }
  }
};

// Tasks a thread takes at least, so that it gets about as many multiplications as waking it costs.
int64_t attention_grain(const AttentionProblem& p, int64_t tasks) {
  constexpr double kThreadWork = 5e5;
  const double work = static_cast<double>(p.batch * p.heads) * static_cast<double>(p.queries) *
                      static_cast<double>(p.keys) * static_cast<double>(2 * p.dim);
  return std::max(int64_t{1}, static_cast<int64_t>(kThreadWork * static_cast<double>(tasks) / std::max(work, 1.0)));
}

template <class Kernel>
void run_tasks(const AttentionProblem& p, int64_t tasks, const Kernel& kernel) {
  const int64_t grain = attention_grain(p, tasks);
  if (tasks <= grain) return kernel(int64_t{0}, tasks);
  torch::stable::parallel_for(0, tasks, grain, kernel);
}

struct CpuAttention {
  static void check(const char* op, const Operand& o) { CpuBackend::check(op, o); }
  static void check_limit(const char*, const AttentionProblem&, const Operand&, bool) {}
  static int64_t attention_workspace(const AttentionProblem&) { return 0; }
  static int64_t attention_grad_workspace(const AttentionProblem& p) { return cpu::attention_grad_workspace(p); }
  static void attention(const AttentionArgs& args, const Operand&) {
    run_tasks(args.problem, cpu::attention_tasks(args.problem),
              [&](int64_t begin, int64_t end) { cpu::attention(args, begin, end); });
  }
  static void attention_grad(const AttentionGradArgs& args, const Operand&) {
    for (int64_t phase = 0; phase < cpu::attention_grad_phases(args.problem); ++phase) {
      run_tasks(args.problem, cpu::attention_grad_tasks(args.problem, phase),
                [&](int64_t begin, int64_t end) { cpu::attention_grad(args, phase, begin, end); });
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffkern, CPU, m) {
  Ops<CpuBackend>::implement(m);
  LearnedStepOps<CpuBackend>::implement(m);
  NoiseSumOps<CpuBackend>::implement(m);
  VariationalOps<CpuBackend>::implement(m);
  StepLogprobOps<CpuBackend>::implement(m);
  StatisticsOps<CpuStatistics>::implement(m);
  AttentionOps<CpuAttention>::implement(m);
}

}  // namespace dk::bind
