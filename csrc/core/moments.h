// Mean and unbiased standard deviation of each sample, in two passes: the sum, then the squares of what is left of the
// mean. Both are added up in the order of ordered_sum.h, over positions in memory order where a sample has no gaps.
#pragma once

#include "args.h"
#include "ordered_sum.h"

namespace dk {

struct MomentsArgs {
  Space space;
  View x;
  void* value;     // [batch, 2]: mean, standard deviation; float32 (float64 if x is)
  void* partials;  // [batch, sum_blocks(count)] of the same
};

template <class T>
DK_HD T mean_of(T sum, int64_t count) {
  return div(sum, static_cast<T>(count));  // NaN of nothing, as torch
}

template <class T>
DK_HD T deviation_of(T squares, int64_t count) {
  return count < 2 ? not_a_number<T>() : sqrt(div(squares, static_cast<T>(count - 1)));
}

template <class T>
DK_HD T square_from(T x, T mean) {
  const T difference = sub(x, mean);
  return mul(difference, difference);
}

namespace cpu {
int64_t moments_phases(const Space& space);
int64_t moments_tasks(const Space& space, int64_t phase);
void moments(const MomentsArgs& args, int64_t phase, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
int moments(const MomentsArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
