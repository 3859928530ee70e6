// Loops that g++ vectorises, once for every instruction set: at_level<Body>(args ...) is Body::run(args ...) inlined
// into a function with the target of the level in use. `run` is DK_BODY and holds the formulas of core in plain loops;
// there are no intrinsics in it, so that every level gives the same bits.
#pragma once

#include <type_traits>

#include "isa.h"
#include "targets.h"

namespace dk::cpu {

// Structs by reference. Pointers and numbers by value: a loop may think of them as constant.
template <class A>
using Passed = std::conditional_t<std::is_class<A>::value, const A&, A>;

struct ScalarLoops {
  template <class Body, class... Args>
  static auto run(Passed<Args>... args) {
    return Body::run(args...);
  }
};
#if defined(__x86_64__)
struct Avx2Loops {
  template <class Body, class... Args>
  DK_AVX2 static auto run(Passed<Args>... args) {
    return Body::run(args...);
  }
};
struct Avx512Loops {
  template <class Body, class... Args>
  DK_AVX512 static auto run(Passed<Args>... args) {
    return Body::run(args...);
  }
};
#endif

template <class Body, class... Args>
auto at_level(Args&&... args) {
#if defined(__x86_64__)
  if (isa().loops == Loops::avx512) return Avx512Loops::run<Body, std::decay_t<Args>...>(args...);
  if (isa().loops == Loops::avx2) return Avx2Loops::run<Body, std::decay_t<Args>...>(args...);
#endif
  return ScalarLoops::run<Body, std::decay_t<Args>...>(args...);
}

}  // namespace dk::cpu
