// The bodies of the statistics' inner loops, inlined into functions that carry the target of a level: no intrinsics, so
// one file serves all of them.
#include "statistics.h"

#include "spans.h"

namespace dk::cpu {
namespace {

template <class T>
DK_BODY void keys_body(const T* x, int64_t n, Key<T>* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = key_of(x[i]);
}

// After the first digit few elements are left: most stretches have none.
template <class T>
DK_BODY int64_t matching_body(const T* x, int64_t n, int shift, Key<T> lower, Key<T> upper, Key<T>* out) {
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

template <class T>
DK_BODY void threshold_body(const T* x, T s, T* out, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = thresholded(x[i], s);
}

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

}  // namespace
}  // namespace dk::cpu

#define DK_STATISTICS(LEVEL, TARGET)                                                                            \
  namespace dk::cpu {                                                                                           \
  namespace {                                                                                                   \
  template <class T>                                                                                            \
  struct LEVEL {                                                                                                \
    TARGET static void keys(const T* x, int64_t n, Key<T>* out) { keys_body(x, n, out); }                       \
    TARGET static int64_t matching(const T* x, int64_t n, int shift, Key<T> lower, Key<T> upper, Key<T>* out) { \
      return matching_body(x, n, shift, lower, upper, out);                                                     \
    }                                                                                                           \
    TARGET static void threshold(const T* x, T s, T* out, int64_t n) { threshold_body(x, s, out, n); }          \
    TARGET static T sum(const T* x, int64_t n, T* scratch) { return folded(Values<T>{x}, n, scratch); }         \
    TARGET static T squares(const T* x, T mean, int64_t n, T* scratch) {                                        \
      return folded(Squares<T>{x, mean}, n, scratch);                                                           \
    }                                                                                                           \
    static constexpr StatisticsSpans<T> kSpans{keys, matching, threshold, sum, squares};                        \
  };                                                                                                            \
  }                                                                                                             \
  }

DK_STATISTICS(Scalar, )
#if defined(__x86_64__)
DK_STATISTICS(Avx2, __attribute__((target("avx2,fma,f16c"))))
DK_STATISTICS(Avx512,
              __attribute__((target("avx2,fma,f16c,avx512f,avx512dq,avx512bw,avx512vl,prefer-vector-width=512"))))
#endif

namespace dk::cpu {

template <class T>
const StatisticsSpans<T>& statistics() {
#if defined(__x86_64__)
  if (&isa() == &kAvx512) return Avx512<T>::kSpans;
  if (&isa() == &kAvx2) return Avx2<T>::kSpans;
#endif
  return Scalar<T>::kSpans;
}

template const StatisticsSpans<float>& statistics<float>();
template const StatisticsSpans<double>& statistics<double>();

}  // namespace dk::cpu
