// What `diffkern info` and the benchmarks ask about the micro-kernels.
#include <algorithm>
#include <chrono>
#include <string>

#include "attention_pack.h"

namespace dk::cpu {
namespace {

void multiply(const TileProduct<float>& product) { attention_tiles().multiply(product); }
void multiply(const TileProduct<Pair>& product) { attention_tiles().multiply_pairs(product); }

template <class T>
double rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRows = 60, kDepth = 64, kCalls = 100;  // a, b and c fit in 48 KiB
  Arena count(nullptr);
  count.take<T>(kRows * kDepth), count.take<T>(kDepth * kQueryTile), count.take<float>(kRows * kQueryTile);
  Arena arena(scratch(count.used()));
  T* a = arena.take<T>(kRows * kDepth);
  T* b = arena.take<T>(kDepth * kQueryTile);
  float* c = arena.take<float>(kRows * kQueryTile);
  const uint32_t ones = 0x3f803f80;  // as a pair of bfloat16; not zeros, which draw less power and run faster
  for (int64_t i = 0; i < kRows * kDepth; ++i) std::memcpy(a + i, &ones, sizeof ones);
  for (int64_t i = 0; i < kDepth * kQueryTile; ++i) std::memcpy(b + i, &ones, sizeof ones);
  const TileProduct<T> product{a, kDepth, 1, b, kQueryTile, c, kQueryTile, kRows, kQueryTile, kDepth, false};
  const double flops = 2.0 * kRows * kQueryTile * kDepth * kCalls * (std::is_same<T, Pair>::value ? 2 : 1);
  double best = 0.0;
  const Clock::time_point start = Clock::now();
  for (Clock::time_point now = start; now - start < std::chrono::duration<double>(seconds) || best == 0.0;) {
    const Clock::time_point before = now;
    for (int64_t i = 0; i < kCalls; ++i) multiply(product);
    now = Clock::now();
    best = std::max(best, flops * 1e-9 / std::chrono::duration<double>(now - before).count());
  }
  return best;
}

}  // namespace

const char* attention_kernel(Dtype dtype) {
  static const std::string name = attention_tiles().name;
  static const std::string floats = name + " float32", halves = name + " float32, float16 widened";
  static const std::string pairs =
      in_pairs(Dtype::bf16) ? name + "_bf16 dot products" : name + " float32, bfloat16 widened";
  switch (dtype) {
    case Dtype::f64:
      return "plain float64";
    case Dtype::f16:
      return halves.c_str();
    case Dtype::bf16:
      return pairs.c_str();
    default:
      return floats.c_str();
  }
}

double attention_gemm_rate(Dtype dtype, double seconds) {
  if (dtype == Dtype::f64) return 0.0;
  return in_pairs(dtype) ? rate<Pair>(seconds) : rate<float>(seconds);
}

}  // namespace dk::cpu
