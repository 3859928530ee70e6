// Quantiles and thresholds by counting digits. A small sample is one task; the parts of a large one are counted by many
// tasks, whose counts one task a sample adds up between the passes.
#include "../core/quantile.h"

#include <cstring>

#include "blocks.h"
#include "levels.h"

namespace dk::cpu {
namespace {

struct Keys {
  template <class T>
  DK_BODY static void run(const T* x, int64_t n, Key<T>* out) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = key_of(x[i]);
  }
};

// The keys whose digits above `shift` are one of two prefixes; returns how many. `out` has room for all. After the
// first digit few elements are left: most stretches have none.
struct Matching {
  template <class T>
  DK_BODY static int64_t run(const T* x, int64_t n, int shift, Key<T> lower, Key<T> upper, Key<T>* out) {
    constexpr int64_t kStretch = 32;
    int64_t found = 0, begin = 0;
    for (; begin + kStretch <= n; begin += kStretch) {
      const T* from = x + begin;
      Key<T> any = 0;
      for (int64_t i = 0; i < kStretch; ++i) {
        const Key<T> top = key_of(from[i]) >> shift;
        any |= static_cast<Key<T>>(top == lower) | static_cast<Key<T>>(top == upper);
      }
      if (any == 0) continue;
      for (int64_t i = 0; i < kStretch; ++i) {
        const Key<T> key = key_of(from[i]), top = key >> shift;
        out[found] = key;
        found += (top == lower) | (top == upper);
      }
    }
    for (; begin < n; ++begin) {
      const Key<T> key = key_of(x[begin]), top = key >> shift;
      out[found] = key;
      found += (top == lower) | (top == upper);
    }
    return found;
  }
};

struct Thresholded {
  template <class T>
  DK_BODY static void run(const T* x, T s, T* out, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[i] = thresholded(x[i], s);
  }
};

constexpr int64_t kPartBlocks = kQuantilePart / kBlock;

bool is_whole(const Space& space) { return space.count <= kQuantilePart; }

Block block_of(const Space& space, int64_t sample, int64_t number) {
  return block_at(space, sample * count_blocks(space) + number);
}

// Counts the digits of the first round of some blocks. Neighbours of normal data often share their digit: taking turns
// between copies of the counters, one increment need not wait for the last.
template <class T>
void count_first(const QuantileArgs& args, int64_t sample, int64_t begin, int64_t end, uint32_t* counts) {
  constexpr int kBins = digit_values<T>(0), kCopies = 2 * kCounts / kBins, kShift = shift_of<T>(0);
  T buffer[kBlock];
  Key<T> keys[kBlock];
  uint32_t copies[kCopies][kBins] = {};
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_of(args.space, sample, i);
    at_level<Keys>(load(args.space, args.x, block, buffer), block.n, keys);
    int64_t at = 0;
    for (; at + kCopies <= block.n; at += kCopies) {
      for (int k = 0; k < kCopies; ++k) ++copies[k][keys[at + k] >> kShift];
    }
    for (; at < block.n; ++at) ++copies[0][keys[at] >> kShift];
  }
  for (int64_t i = 0; i < kBins; ++i) {
    uint32_t sum = 0;
    for (int k = 0; k < kCopies; ++k) sum += copies[k][i];
    counts[i] = sum;
  }
}

// Counts the digits of a later round among the elements that share the digits so far of one of the two ranks.
template <class T>
void count_matching(const QuantileArgs& args, int64_t sample, int64_t begin, int64_t end, int round,
                    const Selected& selected, uint32_t* counts) {
  T buffer[kBlock];
  Key<T> keys[kBlock];
  const int before = shift_of<T>(round - 1), shift = shift_of<T>(round);
  const Key<T> lower = static_cast<Key<T>>(selected.lower.prefix), upper = static_cast<Key<T>>(selected.upper.prefix);
  const Key<T> mask = static_cast<Key<T>>(digit_values<T>(round) - 1);
  std::memset(counts, 0, kCounts * sizeof *counts);
  for (int64_t i = begin; i < end; ++i) {
    const Block block = block_of(args.space, sample, i);
    const T* x = load(args.space, args.x, block, buffer);
    const int64_t found = at_level<Matching>(x, block.n, before, lower, upper, keys);
    for (int64_t at = 0; at < found; ++at) {
      const Key<T> key = keys[at];
      ++counts[((key >> before) == lower ? 0 : kSecond) + ((key >> shift) & mask)];
    }
  }
}

template <class T>
void count(const QuantileArgs& args, int64_t sample, int64_t begin, int64_t end, int round, const Selected& selected,
           uint32_t* counts) {
  if (round == 0) {
    count_first<T>(args, sample, begin, end, counts);
  } else {
    count_matching<T>(args, sample, begin, end, round, selected, counts);
  }
}

// Walks the counts of a digit to the rank.
template <class Count>
void walk(const Count* counts, int bits, Selection& selection) {
  constexpr int64_t kStride = 64;
  const int64_t bins = int64_t{1} << bits;
  int64_t digit = 0;
  for (; digit < bins; digit += kStride) {
    Count sum = 0;
    for (int64_t i = 0; i < kStride; ++i) sum += counts[digit + i];
    if (selection.rank < static_cast<int64_t>(sum)) break;
    selection.rank -= static_cast<int64_t>(sum);
  }
  while (selection.rank >= static_cast<int64_t>(counts[digit])) selection.rank -= static_cast<int64_t>(counts[digit++]);
  selection.prefix = selection.prefix << bits | static_cast<uint64_t>(digit);
}

template <class T, class Count>
void pick(const Count* counts, int round, Selected& selected) {
  const int bits = digit_bits<T>(round);
  if (round == 0) selected.nan = counts[digit_values<T>(0) - 1] != 0;
  const bool apart = selected.lower.prefix != selected.upper.prefix;
  walk(counts, bits, selected.lower);
  walk(counts + (apart ? kSecond : 0), bits, selected.upper);
}

template <class T>
void apply(const QuantileArgs& args, int64_t sample, int64_t number) {
  T in[kBlock], out[kBlock];
  const Block block = block_of(args.space, sample, number);
  const T s = threshold_of(static_cast<const T*>(args.value)[sample], static_cast<T>(args.maximum));
  const T* x = load(args.space, args.x, block, in);
  T* to = target(args.space, args.out, block, out);
  at_level<Thresholded>(x, s, to, block.n);
  store(args.space, args.out, block, to, out);
}

template <class T>
void whole(const QuantileArgs& args, int64_t sample) {
  uint32_t counts[kCounts];
  const int64_t blocks = count_blocks(args.space);
  Selected selected = select_from(args);
  for (int round = 0; round < kQuantilePasses<T> && !selected.nan; ++round) {
    count<T>(args, sample, 0, blocks, round, selected, counts);
    pick<T>(counts, round, selected);
  }
  static_cast<T*>(args.value)[sample] = quantile_value<T>(args, selected);
  if (args.out.data == nullptr) return;
  for (int64_t i = 0; i < blocks; ++i) apply<T>(args, sample, i);
}

// The workspace of samples in parts: what is selected so far, then the counts of each part.
struct Workspace {
  Selected* selected;
  uint32_t* counts;
  Workspace(const QuantileArgs& args)
      : selected(static_cast<Selected*>(args.workspace)),
        counts(reinterpret_cast<uint32_t*>(selected + args.space.batch)) {}
};

template <class T>
void count_part(const QuantileArgs& args, int64_t task, int round) {
  const Workspace work(args);
  const int64_t parts = quantile_parts(args.space), sample = task / parts, begin = (task % parts) * kPartBlocks;
  const int64_t end = std::min(begin + kPartBlocks, count_blocks(args.space));
  count<T>(args, sample, begin, end, round, round == 0 ? select_from(args) : work.selected[sample],
           work.counts + task * kCounts);
}

template <class T>
void pick_sample(const QuantileArgs& args, int64_t sample, int round) {
  const Workspace work(args);
  const int64_t parts = quantile_parts(args.space);
  const uint32_t* counts = work.counts + sample * parts * kCounts;
  int64_t sums[kCounts] = {};
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < kCounts; ++i) sums[i] += counts[part * kCounts + i];
  }
  Selected selected = round == 0 ? select_from(args) : work.selected[sample];
  pick<T>(sums, round, selected);
  work.selected[sample] = selected;
  if (round + 1 == kQuantilePasses<T>) static_cast<T*>(args.value)[sample] = quantile_value<T>(args, selected);
}

template <class T>
void run(const QuantileArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const int64_t blocks = count_blocks(args.space);
  const int round = static_cast<int>(phase / 2);
  for (int64_t task = begin; task < end; ++task) {
    if (is_whole(args.space)) {
      whole<T>(args, task);
    } else if (round == kQuantilePasses<T>) {
      apply<T>(args, task / blocks, task % blocks);
    } else if (phase % 2 == 0) {
      count_part<T>(args, task, round);
    } else {
      pick_sample<T>(args, task, round);
    }
  }
}

}  // namespace

int64_t quantile_workspace(const Space& space) {
  if (is_whole(space)) return 0;
  const int64_t counts = quantile_parts(space) * kCounts * static_cast<int64_t>(sizeof(uint32_t));
  return space.batch * (static_cast<int64_t>(sizeof(Selected)) + counts);
}

int64_t quantile_phases(const QuantileArgs& args) {
  if (is_whole(args.space)) return 1;
  const int64_t passes = args.x.dtype == Dtype::f64 ? kQuantilePasses<double> : kQuantilePasses<float>;
  return 2 * passes + (args.out.data != nullptr ? 1 : 0);
}

int64_t quantile_tasks(const QuantileArgs& args, int64_t phase) {
  const Space& space = args.space;
  if (is_whole(space) || phase % 2 == 1) return space.batch;
  const int64_t passes = args.x.dtype == Dtype::f64 ? kQuantilePasses<double> : kQuantilePasses<float>;
  return space.batch * (phase == 2 * passes ? count_blocks(space) : quantile_parts(space));
}

void quantile(const QuantileArgs& args, int64_t phase, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? run<double>(args, phase, begin, end) : run<float>(args, phase, begin, end);
}

}  // namespace dk::cpu
