// The ops on CPU tensors: torch's own threads run the blocks.
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
  static void loss(const LossArgs& args, const Operand&) {
    run(cpu::loss, args, args.seeds.data != nullptr);
    cpu::loss_finish(args);
  }
  static void variational(const VariationalArgs& args, const Operand&) {
    run(cpu::variational, args, true);
    cpu::variational_finish(args);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(diffkern, CPU, m) {
  Ops<CpuBackend>::implement(m);
  VariationalOps<CpuBackend>::implement(m);
}

}  // namespace dk::bind
