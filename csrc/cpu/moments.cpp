// Mean and standard deviation: partial sums of blocks and their ordered sum, twice. A small sample is one task; a large
// one takes phases over its blocks.
#include "../core/moments.h"

#include "blocks.h"
#include "levels.h"
#include "ordered_sum.h"

namespace dk::cpu {
namespace {

template <class T>
struct Values {
  const T* x;
  DK_BODY T operator()(int64_t i) const { return x[i]; }
};
template <class T>
struct Squares {
  const T* x;
  T mean;
  DK_BODY T operator()(int64_t i) const { return square_from(x[i], mean); }
};

// The fold of n values: the first two folds of a whole block at once, without storing what they fold.
template <class T, class Value>
DK_BODY T folded(const Value& value, int64_t n, T* scratch) {
  const Value v = value;
  int64_t width = kSumBlock;
  if (n == kSumBlock) {
    width = kSumBlock / 4;
#pragma GCC ivdep
    for (int64_t i = 0; i < width; ++i) {
      scratch[i] = add(add(v(i), v(i + 2 * width)), add(v(i + width), v(i + 3 * width)));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) scratch[i] = v(i);
    for (int64_t i = n; i < width; ++i) scratch[i] = T(0);
  }
  return fold(scratch, width);
}

struct Sum {
  template <class T>
  DK_BODY static T run(const T* x, int64_t n, T* scratch) {
    return folded(Values<T>{x}, n, scratch);
  }
};
struct SquareSum {
  template <class T>
  DK_BODY static T run(const T* x, T mean, int64_t n, T* scratch) {
    return folded(Squares<T>{x, mean}, n, scratch);
  }
};

constexpr int64_t kWholeBlocks = 64;

bool is_whole(const Space& space) { return count_blocks(space) <= kWholeBlocks; }

template <class T>
T partial(const MomentsArgs& args, int64_t index, bool squares) {
  T buffer[kBlock], scratch[kBlock];
  const Block block = block_at(args.space, index);
  const T* x = load(args.space, args.x, block, buffer);
  if (!squares) return at_level<Sum>(x, block.n, scratch);
  return at_level<SquareSum>(x, static_cast<const T*>(args.value)[2 * block.sample], block.n, scratch);
}

// The mean from the sums of a sample's blocks, or the deviation from their squares.
template <class T>
void finish(const MomentsArgs& args, int64_t sample, const T* partials, bool squares) {
  const int64_t count = args.space.count;
  const T sum = ordered_sum(partials, count_blocks(args.space));
  static_cast<T*>(args.value)[2 * sample + (squares ? 1 : 0)] =
      squares ? deviation_of(sum, count) : mean_of(sum, count);
}

template <class T>
void run(const MomentsArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const int64_t blocks = count_blocks(args.space);
  T* partials = static_cast<T*>(args.partials);
  const bool squares = phase >= 2;
  for (int64_t task = begin; task < end; ++task) {
    if (is_whole(args.space)) {
      T own[kWholeBlocks];
      for (const bool second : {false, true}) {
        for (int64_t i = 0; i < blocks; ++i) own[i] = partial<T>(args, task * blocks + i, second);
        finish(args, task, own, second);
      }
    } else if (phase % 2 == 0) {
      partials[task] = partial<T>(args, task, squares);
    } else {
      finish(args, task, partials + task * blocks, squares);
    }
  }
}

}  // namespace

int64_t moments_phases(const Space& space) { return is_whole(space) ? 1 : 4; }

int64_t moments_tasks(const Space& space, int64_t phase) {
  return is_whole(space) || phase % 2 == 1 ? space.batch : space.batch * count_blocks(space);
}

void moments(const MomentsArgs& args, int64_t phase, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? run<double>(args, phase, begin, end) : run<float>(args, phase, begin, end);
}

}  // namespace dk::cpu
