// The ops' schemas, and the ops on CPU tensors: torch's own threads run the blocks.
#include <algorithm>
#include <atomic>
#include <chrono>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

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

  using Clock = std::chrono::steady_clock;

  // What a thread begins with, and the others take pieces of when they are through with their own.
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end, piece;
    Clock::duration fastest, total;  // of the pieces that this part's thread ran
  };
  static constexpr int64_t kParts = 64, kPieces = 8;
  static constexpr std::chrono::milliseconds kLongestAlone{500};

  // body(thread) of each of torch's threads.
  template <class Body>
  static void on_threads(int64_t threads, const Body& body) {
#ifdef __SANITIZE_THREAD__
    // ThreadSanitizer does not see how torch's threads start and join: it is told, at addresses that a thread knows
    // before it reads anything of the call's.
    static char fork, join;
    const auto told = [&](int64_t thread, int64_t) {
      __tsan_acquire(&fork);
      body(thread);
      __tsan_release(&join);
    };
    __tsan_release(&fork);
    torch::stable::parallel_for(0, threads, 1, told);
    __tsan_acquire(&join);
#else
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) { body(thread); });
#endif
  }

  // A thread that the system takes off its core keeps one piece waiting, not its whole part. Each begins with the part
  // that it had in the op before, which its cache may hold. Who runs what changes no bit: tasks are independent.
  //
  // The join still waits for a thread that another process keeps from its core. Where two calls in a row took longer
  // than one thread alone would have, which the fastest piece tells, this one does without the others for ten times
  // what was lost. (One such call is nothing yet: the first makes the threads.)
  template <class Kernel>
  static void over(int64_t tasks, int64_t grain, const Kernel& kernel) {
    if (tasks <= grain) return kernel(int64_t{0}, tasks);
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (tasks + grain - 1) / grain);
    if (threads <= 1) return kernel(int64_t{0}, tasks);
    const Clock::time_point start = Clock::now();
    thread_local Clock::time_point alone_until{};
    thread_local bool was_late = false;
    if (start < alone_until) return kernel(int64_t{0}, tasks);

    const int64_t count = std::min(threads, kParts);
    Part parts[kParts];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * tasks / count, end = (i + 1) * tasks / count;
      parts[i].next.store(begin, std::memory_order_relaxed);
      parts[i].end = end;
      parts[i].piece = (end - begin + kPieces - 1) / kPieces;
      parts[i].fastest = Clock::duration::max();
      parts[i].total = Clock::duration::zero();
    }
    on_threads(threads, [&](int64_t thread) {
      Clock::duration fastest = Clock::duration::max(), total = Clock::duration::zero();
      for (int64_t i = 0; i < count; ++i) {
        Part& part = parts[(thread + i) % count];
        int64_t begin;
        while ((begin = part.next.fetch_add(part.piece, std::memory_order_relaxed)) < part.end) {
          const Clock::time_point before = Clock::now();
          kernel(begin, std::min(begin + part.piece, part.end));
          const Clock::duration taken = Clock::now() - before;
          total += taken;
          if (begin + part.piece <= part.end) fastest = std::min(fastest, taken);
        }
      }
      if (thread < count) parts[thread].fastest = fastest, parts[thread].total = total;
    });
    const Clock::time_point end = Clock::now();
    Clock::duration fastest = Clock::duration::max(), total = Clock::duration::zero();
    for (int64_t i = 0; i < count; ++i) fastest = std::min(fastest, parts[i].fastest), total += parts[i].total;
    if (fastest == Clock::duration::max()) return;
    const Clock::duration alone = std::max(fastest * count * kPieces, total / 2);  // pieces may differ
    const Clock::duration lost = end - start - alone;
    const bool late = lost > std::chrono::milliseconds(1);
    if (late && was_late) alone_until = end + std::min<Clock::duration>(10 * lost, kLongestAlone);
    was_late = late;
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
