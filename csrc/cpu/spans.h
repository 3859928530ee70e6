// Bodies of the functions in isa.h, one source for all instruction sets: each isa_*.cpp inlines them into functions
// that carry its target attribute.
#pragma once

#include "../core/normal.h"
#include "../core/philox.h"
#include "isa.h"
#include "targets.h"

namespace dk::cpu {

// Random words of one group of quads, word j of quad i at words[j][i]; its normals, lane j of quad i at lanes[j][i].
using Group = uint32_t[4][kQuadsAtOnce];
using Lanes = float[4][kQuadsAtOnce];

// The key of every Philox round, made once for a run of groups.
struct Keys {
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
  Keys(uint64_t seed) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, a += kPhiloxW0, b += kPhiloxW1) {
      k0[round] = a;
      k1[round] = b;
    }
  }
  uint64_t seed() const { return k0[0] | k1[0] << 32; }
};

// What an instruction set may do with intrinsics: Philox and the way from lanes to elements. Same bits as this one.
struct ScalarNoise {
  static void words(const Keys& keys, uint64_t stream, uint64_t q0, Group& out) {
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      const Words w = philox(keys.seed(), stream, q0 + static_cast<uint64_t>(i));
      for (int j = 0; j < 4; ++j) out[j][i] = w.r[j];
    }
  }
  static void interleave(const Lanes& lanes, float* out) {
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = lanes[j][i];
    }
  }
};

DK_BODY void normals_of_group(const Group& words, Lanes& lanes) {
  for (int half = 0; half < 2; ++half) {
    const uint32_t *even = words[2 * half], *odd = words[2 * half + 1];
    float *first = lanes[2 * half], *second = lanes[2 * half + 1];
#pragma GCC ivdep
    for (int64_t i = 0; i < kQuadsAtOnce; ++i) {
      const Pair pair = normal_pair(even[i], odd[i]);
      first[i] = pair.a;
      second[i] = pair.b;
    }
  }
}

DK_BODY void widen_bf16_body(const Bfloat16* in, float* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}

DK_BODY void narrow_bf16_body(const float* in, Bfloat16* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = narrow_bf16(in[i]);
}

}  // namespace dk::cpu

// Defines the functions of one table: LOOPS, TARGET attribute, NOISE (as ScalarNoise), widen and narrow f16.
#define DK_DEFINE_ISA(VARIABLE, LOOPS, TARGET, NOISE, WIDEN_F16, NARROW_F16)                                \
  namespace dk::cpu {                                                                                       \
  namespace {                                                                                               \
  TARGET void normals_span(uint64_t seed, uint64_t stream, uint64_t q0, int64_t quads, float* out) {        \
    const Keys keys(seed);                                                                                  \
    for (int64_t done = 0; done < quads; done += kQuadsAtOnce) {                                            \
      Group words;                                                                                          \
      Lanes lanes;                                                                                          \
      NOISE::words(keys, stream, q0 + static_cast<uint64_t>(done), words);                                  \
      normals_of_group(words, lanes);                                                                       \
      NOISE::interleave(lanes, out + 4 * done);                                                             \
    }                                                                                                       \
  }                                                                                                         \
  TARGET void widen_bf16_span(const Bfloat16* in, float* out, int64_t n) { widen_bf16_body(in, out, n); }   \
  TARGET void narrow_bf16_span(const float* in, Bfloat16* out, int64_t n) { narrow_bf16_body(in, out, n); } \
  }                                                                                                         \
  const Isa VARIABLE{LOOPS, normals_span, WIDEN_F16, NARROW_F16, widen_bf16_span, narrow_bf16_span};        \
  }
