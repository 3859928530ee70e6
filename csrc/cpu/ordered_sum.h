// The order in which the values of blocks and of samples are added up (core/ordered_sum.h).
#pragma once

#include "../core/ordered_sum.h"
#include "targets.h"

namespace dk::cpu {

// The sum of `width` values, a power of two, in the order of core/ordered_sum.h.
template <class T>
DK_BODY T fold(T* values, int64_t width) {
  for (int64_t half = width / 2; half > 0; half /= 2) {
#pragma GCC ivdep
    for (int64_t i = 0; i < half; ++i) values[i] = add(values[i], values[i + half]);
  }
  return values[0];
}

// Values 0, every, 2 every, ...: `count` of them, by kSumLanes lanes, then folded.
template <class T>
T ordered_sum(const T* values, int64_t count, int64_t every = 1) {
  T lanes[kSumLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kSumLanes] = add(lanes[i % kSumLanes], values[i * every]);
  for (int half = kSumLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] = add(lanes[j], lanes[j + half]);
  }
  return lanes[0];
}

// The sum or mean of the samples' losses; NaN for the mean of nothing, as torch says. `samples` hold what is left to
// add (the mean's division is in them already).
template <class T>
T reduce_batch(const T* samples, int64_t batch, Reduction reduction) {
  return reduction == Reduction::mean && batch == 0 ? not_a_number<T>() : ordered_sum(samples, batch);
}

}  // namespace dk::cpu
