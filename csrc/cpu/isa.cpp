// Picks the instruction set once: the best this machine has, or the one that DIFFKERN_ISA names.
#include "isa.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#include "../core/cpu.h"
#include "attention_tiles.h"

namespace dk::cpu {
namespace {

// avx512_bf16 differs from avx512 in attention only.
struct Level {
  const char* name;
  const Isa* spans;
  const AttentionTiles* tiles;
};
constexpr Level kLevels[] = {
    {"scalar", &kScalar, &kScalarTiles},
#if defined(__x86_64__)
    {"avx2", &kAvx2, &kAvx2Tiles},
    {"avx512", &kAvx512, &kAvx512Tiles},
    {"avx512_bf16", &kAvx512, &kAvx512Bf16Tiles},
#endif
};

// Which of them is the best this machine has: it has all before it too.
const Level* best() {
  const Level* level = kLevels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    ++level;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      ++level;
      if (__builtin_cpu_supports("avx512bf16")) ++level;
    }
  }
#endif
  return level;
}

const Level& choose() {
  const char* wish = std::getenv("DIFFKERN_ISA");
  const Level* top = best();
  if (wish == nullptr || *wish == '\0') return *top;
  const std::string name = wish;
  std::string names;
  for (const Level* level = kLevels; level <= top; ++level) {
    if (name == level->name) return *level;
  }
  for (const Level& level : kLevels) names += (names.empty() ? "" : ", ") + std::string(level.name);
  throw std::runtime_error("DIFFKERN_ISA must be one of " + names +
                           " and available on this machine (best: " + top->name + "), got '" + name + "'");
}

const Level& chosen() {
  static const Level& level = choose();
  return level;
}

}  // namespace

const Isa& isa() { return *chosen().spans; }
const AttentionTiles& attention_tiles() { return *chosen().tiles; }
const char* isa_name() { return chosen().name; }
const char* isa_best() { return best()->name; }

const char* isa_level(int level) {
  return level >= 0 && level < static_cast<int>(std::size(kLevels)) ? kLevels[level].name : nullptr;
}

}  // namespace dk::cpu
