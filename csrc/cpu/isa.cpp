// Picks the instruction set once: the best this machine has, or the one that DIFFKERN_ISA names.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dk::cpu {
namespace {

const Isa& best() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

const Isa& choose() {
  const char* wish = std::getenv("DIFFKERN_ISA");
  const Isa& top = best();
  if (wish == nullptr || *wish == '\0') return top;
  const std::string name = wish, top_name = top.name;
  if (name == kPortable.name || name == "scalar") return kPortable;
#if defined(__x86_64__)
  if (name == kAvx2.name && top_name != kPortable.name) return kAvx2;
  if (name == kAvx512.name && top_name == kAvx512.name) return kAvx512;
#endif
  throw std::runtime_error("DIFFKERN_ISA must be one of portable, avx2, avx512 and available on this machine (best: " +
                           top_name + "), got '" + name + "'");
}

}  // namespace

const Isa& isa() {
  static const Isa& chosen = choose();
  return chosen;
}

const char* isa_name() { return isa().name; }
const char* isa_best() { return best().name; }

}  // namespace dk::cpu
