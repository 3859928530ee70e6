// The inner loops of the statistics of a sample, once for every instruction set.
#pragma once

#include "../core/moments.h"
#include "../core/quantile.h"
#include "isa.h"

namespace dk::cpu {

template <class T>
struct StatisticsSpans {
  void (*keys)(const T* x, int64_t n, Key<T>* out);
  // The keys whose digits above `shift` are one of two prefixes; returns how many. `out` has room for all.
  int64_t (*matching)(const T* x, int64_t n, int shift, Key<T> lower, Key<T> upper, Key<T>* out);
  void (*threshold)(const T* x, T s, T* out, int64_t n);
  // Sums in the order of core/ordered_sum.h over a block; `scratch` has kSumBlock values.
  T (*sum)(const T* x, int64_t n, T* scratch);
  T (*squares)(const T* x, T mean, int64_t n, T* scratch);
};

template <class T>
const StatisticsSpans<T>& statistics();  // at the level in use

}  // namespace dk::cpu
