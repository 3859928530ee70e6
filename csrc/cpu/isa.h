// What needs intrinsics, or a choice, at every instruction set: noise and the conversions of 16-bit dtypes. Other loops
// are written once, see levels.h. DIFFKERN_ISA=scalar|avx2|avx512|avx512_bf16 forces a level, and tests compare the
// bits of all of them.
#pragma once

#include "../core/args.h"
#include "../core/ordered_sum.h"

namespace dk::cpu {

constexpr int64_t kBlock = 1024;  // elements of a span at most; a multiple of 64
static_assert(kBlock == kSumBlock, "a block of the ordered sums is one span");

constexpr int64_t kQuadsAtOnce = 16;  // normals() writes whole groups of so many quads

enum class Loops { scalar, avx2, avx512 };

struct Isa {
  Loops loops;  // the target of loops without intrinsics
  // Normals of quads q0 .. q0 + quads - 1, rounded up to whole groups: out has room for them.
  void (*normals)(uint64_t seed, uint64_t stream, uint64_t q0, int64_t quads, float* out);
  void (*widen_f16)(const Half*, float*, int64_t n);
  void (*narrow_f16)(const float*, Half*, int64_t n);
  void (*widen_bf16)(const Bfloat16*, float*, int64_t n);
  void (*narrow_bf16)(const float*, Bfloat16*, int64_t n);
};

extern const Isa kScalar;
#if defined(__x86_64__)
extern const Isa kAvx2, kAvx512;
#endif

const Isa& isa();  // the level in use

}  // namespace dk::cpu
