// The CPU attention kernels behind C functions of flat int64 arrays, for helpers/cpu_kernels.py.
#include <core/cpu.h>
#include <core/attention.h>

#include <thread>
#include <vector>

namespace {

dk::HeadsView view(const int64_t* v) { return {reinterpret_cast<void*>(v[0]), v[1], v[2], v[3], v[4]}; }

// dtype, batch, heads, queries, keys, dim, then q, k, v (5 words each)
dk::AttentionProblem problem(const int64_t* w, double scale) {
  return {static_cast<dk::Dtype>(w[0]), w[1], w[2], w[3], w[4], w[5], scale, view(w + 6), view(w + 11), view(w + 16)};
}

// Runs run(begin, end) over all tasks, `at_once` of them a call, the calls spread over threads; backwards if asked.
template <class F>
void over(int64_t tasks, int64_t threads, int64_t at_once, bool backwards, const F& run) {
  if (at_once <= 0) at_once = (tasks + threads - 1) / threads;
  if (at_once <= 0) return;
  const auto part = [&](int64_t thread) {
    const int64_t calls = (tasks + at_once - 1) / at_once;
    for (int64_t i = thread; i < calls; i += threads) {
      const int64_t begin = (backwards ? calls - 1 - i : i) * at_once;
      run(begin, begin + at_once < tasks ? begin + at_once : tasks);
    }
  };
  std::vector<std::thread> others;
  for (int64_t thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

const char* dk_isa() { return dk::cpu::isa_name(); }
const char* dk_isa_best() { return dk::cpu::isa_best(); }

// views: out; lse
void dk_attention(const int64_t* words, double scale, int64_t threads, int64_t at_once) {
  const int64_t* more = words + 21;
  const dk::AttentionArgs args{problem(words, scale), view(more), reinterpret_cast<void*>(more[5]), nullptr};
  over(dk::cpu::attention_tasks(args.problem), threads, at_once, false,
       [&](int64_t begin, int64_t end) { dk::cpu::attention(args, begin, end); });
}

int64_t dk_attention_grad_workspace(const int64_t* words) {
  return dk::cpu::attention_grad_workspace(problem(words, 1.0));
}

// views: out, grad_out, dq, dk, dv; lse, workspace
void dk_attention_grad(const int64_t* words, double scale, int64_t threads, int64_t at_once, int64_t backwards) {
  const int64_t* more = words + 21;
  const dk::AttentionGradArgs args{
      problem(words, scale), view(more),      view(more + 5),  reinterpret_cast<const void*>(more[25]),
      view(more + 10),       view(more + 15), view(more + 20), reinterpret_cast<void*>(more[26])};
  for (int64_t phase = 0; phase < dk::cpu::attention_grad_phases(args.problem); ++phase) {
    over(dk::cpu::attention_grad_tasks(args.problem, phase), threads, at_once, backwards != 0,
         [&](int64_t begin, int64_t end) { dk::cpu::attention_grad(args, phase, begin, end); });
  }
}

}  // extern "C"
