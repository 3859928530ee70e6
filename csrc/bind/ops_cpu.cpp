// The ops' schemas, and the ops on CPU tensors: torch's own threads run the blocks.
#include <algorithm>

#include "../core/cpu.h"
#include "families.h"

namespace dk::bind {
namespace {

struct CpuBackend {
  static constexpr bool kHost = true;
  static constexpr int64_t kMaxChannels = 16;  // a block of kBlock elements holds long enough runs of a channel

  // Blocks a thread takes at least: below, waking a second thread costs more than it saves.
  static constexpr int64_t kGrain = 32, kGrainWithNoise = 16;
  static int64_t grain(bool draws) { return draws ? kGrainWithNoise : kGrain; }

  static void check(const char* op, const Operand& o) {
    if (o.device_type != aoti_torch_device_type_cpu()) fail(op, o.name, " must be on the CPU, got ", device_text(o));
  }

  template <class Kernel>
  static void over(int64_t tasks, int64_t grain, const Kernel& kernel) {
    if (tasks <= grain) return kernel(int64_t{0}, tasks);
    torch::stable::parallel_for(0, tasks, grain, kernel);
  }

  template <class Args>
  static void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t grain) {
    over(args.space.batch * cpu::blocks_per_sample(args.space), grain,
         [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // The tasks of one phase; a thread takes at least `blocks` blocks' worth of them.
  template <class Kernel>
  static void run_phase(const Space& space, int64_t tasks, int64_t blocks, const Kernel& kernel) {
    const int64_t all = std::max(int64_t{1}, space.batch * cpu::blocks_per_sample(space));
    over(tasks, std::max(int64_t{1}, blocks * tasks / all), kernel);
  }
};

}  // namespace

std::vector<Table> tables() {
  std::vector<Table> found;
  for_each_family<CpuBackend>([&](auto family) {
    if constexpr (requires { family.table(); }) found.push_back(family.table());
  });
  return found;
}

STABLE_TORCH_LIBRARY(diffkern, m) {
  for_each_family<CpuBackend>([&](auto family) { family.define(m); });
}

STABLE_TORCH_LIBRARY_IMPL(diffkern, CPU, m) {
  for_each_family<CpuBackend>([&](auto family) { family.implement(m); });
}

}  // namespace dk::bind
