// The quantile of |x| over each sample, and the threshold of Imagen (arXiv 2205.11487) that is made of it.
//
//   s = clamp(quantile(|x|, q), 1, maximum),   out = clamp(x, -s, s) / s
//
// |x| has the order of the integer of its bits, the key, so a rank is found without sorting, digit by digit: count the
// candidates with each value of the digit, walk the counts to the rank, keep the candidates that share the digit. The
// two ranks around q (count - 1) are looked for in the same passes. Counts are integers: no order of adding them shows.
#pragma once

#include "args.h"

namespace dk {

template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr int kBits = 31, kFirst = 11;  // of a key; of the first digit
};
template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr int kBits = 63, kFirst = 12;  // 11 would be the exponent alone, and not tell infinity from NaN
};
template <class T>
using Key = typename KeyOf<T>::type;

constexpr int kDigitBits = 11;                       // of the digits after the first
constexpr int kSecond = 1 << kDigitBits;             // where the counts of the upper rank begin, after the first digit
constexpr int kCounts = 2 * kSecond;                 // counters of a sample
constexpr int64_t kQuantilePart = int64_t{1} << 16;  // elements that one task or block of threads counts at most

// Bits of a key below the digit of a pass.
template <class T>
DK_HD constexpr int shift_of(int pass) {
  const int shift = KeyOf<T>::kBits - KeyOf<T>::kFirst - kDigitBits * pass;
  return shift > 0 ? shift : 0;
}
template <class T>
constexpr int kQuantilePasses = 1 + (KeyOf<T>::kBits - KeyOf<T>::kFirst + kDigitBits - 1) / kDigitBits;
// Bits of the digit, and the number of its values.
template <class T>
DK_HD constexpr int digit_bits(int pass) {
  return pass == 0 ? KeyOf<T>::kFirst : shift_of<T>(pass - 1) - shift_of<T>(pass);
}
template <class T>
DK_HD constexpr int digit_values(int pass) {
  return 1 << digit_bits<T>(pass);
}
static_assert((1 << KeyOf<double>::kFirst) <= kCounts, "the first digit has all counters");

// NaN is the last key and the only one whose first digit is all ones.
DK_HD uint32_t key_of(float x) {
  const uint32_t bits = float_bits(x) & 0x7fffffffu;
  return bits > 0x7f800000u ? 0x7fffffffu : bits;
}
DK_HD uint64_t key_of(double x) {
  const uint64_t bits = double_bits(x) & 0x7fffffffffffffffull;
  return bits > 0x7ff0000000000000ull ? 0x7fffffffffffffffull : bits;
}
DK_HD float value_of(uint32_t key) { return bits_float(key); }
DK_HD double value_of(uint64_t key) { return bits_double(key); }

// A rank that is looked for: the digits found, and the rank among the elements that share them.
struct Selection {
  uint64_t prefix;
  int64_t rank;
};
struct Selected {
  Selection lower, upper;
  bool nan;  // is one of the elements NaN?
};

struct QuantileArgs {
  Space space;
  View x, out;           // out: absent where only the quantile is wanted
  int64_t lower, upper;  // the ranks around q (count - 1)
  double weight;         // of the upper one
  double maximum;
  void* value;      // [batch] quantiles, float32 (float64 if x is)
  void* workspace;  // as many bytes as quantile_workspace says, aligned to 8
};

// q in the dtype of the quantile, times the last rank in float64: as torch.quantile.
inline void set_ranks(QuantileArgs& args, double q) {
  const double rounded = args.x.dtype == Dtype::f64 ? q : static_cast<double>(static_cast<float>(q));
  const double rank = rounded * static_cast<double>(args.space.count - 1);
  args.lower = static_cast<int64_t>(rank);
  args.weight = rank - static_cast<double>(args.lower);
  args.upper = args.weight > 0 ? args.lower + 1 : args.lower;
}

DK_HD Selected select_from(const QuantileArgs& args) { return {{0, args.lower}, {0, args.upper}, false}; }

// The value between the two ranks, as torch.lerp with a fused product; NaN where an element is NaN, and between two
// infinities.
template <class T>
DK_HD T quantile_value(const QuantileArgs& args, const Selected& found) {
  const T a = value_of(static_cast<Key<T>>(found.lower.prefix)), b = value_of(static_cast<Key<T>>(found.upper.prefix));
  const T weight = static_cast<T>(args.weight), difference = sub(b, a);
  const T between = weight < T(0.5) ? fma(weight, difference, a) : fma(sub(weight, T(1)), difference, b);
  return found.nan ? not_a_number<T>() : between;
}

template <class T>
DK_HD T threshold_of(T quantile, T maximum) {
  const T raised = quantile < T(1) ? T(1) : quantile;
  return raised > maximum ? maximum : raised;
}

template <class T>
DK_HD T thresholded(T x, T s) {
  const T above = x < -s ? -s : x;
  return div(above > s ? s : above, s);
}

DK_HD int64_t quantile_parts(const Space& space) { return (space.count + kQuantilePart - 1) / kQuantilePart; }

namespace cpu {
// Phases run one after the other, the tasks of a phase in any order.
int64_t quantile_workspace(const Space& space);
int64_t quantile_phases(const QuantileArgs& args);
int64_t quantile_tasks(const QuantileArgs& args, int64_t phase);
void quantile(const QuantileArgs& args, int64_t phase, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int64_t quantile_workspace(const Space& space);
int quantile(const QuantileArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
