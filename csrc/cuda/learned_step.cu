// The sampler step with a learned variance.
#include "../core/learned_step.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

// A row as the kernel uses it: made on the host for a row by value, else by one thread of each block.
template <class T>
struct LearnedRow {
  StepCoefficients<T> k;
  LearnedDeviation<T> deviation;
  uint32_t terms;
  uint64_t stream, known_stream;
};

template <class T>
struct LearnedParams {
  LearnedStepArgs args;
  uint32_t want;
  LearnedRow<T> row;  // if args.rows.table is nullptr
};

// Outputs are NaN: the row is not in the table, has terms of another step, or reads an operand that is not there.
constexpr uint32_t kInvalid = 1u << 31;
constexpr uint32_t kWants = kWantX0 | kWantNext;
constexpr uint32_t kReadsX = kTermP | kTermA;
constexpr uint32_t kReadsM = kTermQ | kTermD;
constexpr uint32_t kMaskTerms = kTermMask | kTermKnownS | kTermKnownN;
// What a row may have beside the mask; the compiler drops the rest of the step's formula.
constexpr uint32_t kTerms = kInvalid | kWants | kReadsX | kReadsM | kTermClip | kTermB | kTermG | kTermV;

DK_HD bool lacks(uint32_t terms, const LearnedStepArgs& args) {
  bool lacking = (terms & kReadsX) && args.x.data == nullptr;
  lacking |= (terms & kReadsM) && args.m.data == nullptr;
  lacking |= (terms & kTermV) && args.v.data == nullptr;
  lacking |= (terms & kTermKnownS) && args.known.data == nullptr;
  lacking |= (terms & kTermG) && args.noise.data == nullptr && args.seeds.data == nullptr;
  lacking |= (terms & kTermKnownN) && args.seeds.data == nullptr;
  return lacking;
}

template <class T>
DK_HD LearnedRow<T> make_row(const double* values, uint32_t want, const LearnedStepArgs& args) {
  LearnedRow<T> row;
  row.k = step_coefficients<T>(values);
  row.deviation = learned_deviation<T>(values);
  row.terms = learned_step_terms(values, want);
  row.stream = (row.terms & kTermG) ? static_cast<uint64_t>(values[kStream]) : 0;
  row.known_stream = (row.terms & kTermKnownN) ? static_cast<uint64_t>(values[kKnownStream]) : 0;
  if (learned_step_excess(values) != kLearnedColumns || lacks(row.terms, args)) row.terms = kInvalid | (want & kWants);
  return row;
}

// kMasked: with a mask. Without, it costs no registers.
template <class S, Access access, bool kMasked>
__global__ void __launch_bounds__(kThreads, kMasked || access != Access::direct ? kMinBlocks : 2 * kMinBlocks)
    learned_step_kernel(const LearnedParams<Arithmetic<S>> params) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  const LearnedStepArgs& args = params.args;
  __shared__ __align__(16) float staged[NoiseTile<S, access>::kRoom];
  __shared__ __align__(16) float staged_known[kMasked ? NoiseTile<S, access>::kRoom : 4];
  __shared__ LearnedRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int tile = static_cast<int>(blockDim.x) * W * kChunks<S, access>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, left = args.space.count - begin;

  LearnedRow<T> row;
  if (args.rows.table != nullptr) {
    if (threadIdx.x == 0) {
      const int64_t number = row_number(args.rows, b);
      shared_row = number < 0 ? LearnedRow<T>{{}, {}, kInvalid | (params.want & kWants), 0, 0}
                              : make_row<T>(args.rows.table + number * kLearnedColumns, params.want, args);
    }
    __syncthreads();
    row = shared_row;
  } else {
    row = params.row;
  }
  const uint32_t terms = row.terms & (kMasked ? kTerms | kMaskTerms : kTerms);

  const bool draws = (terms & kTermG) && args.noise.data == nullptr;
  const uint64_t seed = draws || (terms & kTermKnownN) ? seed_of(args.seeds, b) : 0;
  if (access != Access::direct) {
    const int n = left < tile ? static_cast<int>(left) : tile;
    if (draws) stage_noise(args.space, seed, row.stream, begin, n, staged);
    if (kMasked && (terms & kTermKnownN)) stage_noise(args.space, seed, row.known_stream, begin, n, staged_known);
  }

#pragma unroll 1
  for (int chunk = 0; chunk < kChunks<S, access>; ++chunk) {
    const int local = static_cast<int>(chunk * blockDim.x + threadIdx.x) * W;
    const Place<access> place(args.space, b, begin + local, W);
    if (place.n == 0) return;
    T x[W] = {}, m[W] = {}, v[W] = {}, z[W] = {}, mask[W] = {}, known[W] = {}, z2[W] = {};
    if (terms & kReadsX) load_state<S>(args.x, place, x);
    if (terms & kReadsM) load_any(args.m, place.offset(args.m), place.n, m);
    if (terms & kTermV) load_any(args.v, place.offset(args.v), place.n, v);
    if (kMasked) {
      if (terms & kTermMask) load_any(args.mask, place.offset(args.mask), place.n, mask);
      if (terms & kTermKnownS) load_state<S>(args.known, place, known);
    }
    if (draws) {
      chunk_noise<access>(staged, seed, row.stream, place.first, local, z);
    } else if (terms & kTermG) {
      load_state<S>(args.noise, place, z);
    }
    if (kMasked && (terms & kTermKnownN)) {
      chunk_noise<access>(staged_known, seed, row.known_stream, place.first, local, z2);
    }

    T out[W], x0[W], next[W];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const T noise = learned_noise(row.deviation, v[j], z[j]);
      const StepInputs<T> in{x[j], m[j], T(0), {T(0), T(0), T(0), T(0)}, noise, mask[j], known[j], z2[j]};
      StepOutputs<T> o = step_element(row.k, terms, in);
      if (terms & kInvalid) o.x = o.x0 = o.next = not_a_number<T>();
      out[j] = o.x;
      x0[j] = o.x0;
      next[j] = o.next;
    }
    store_state<S>(args.out, place, out);
    if (terms & kWantX0) store_state<S>(args.x0, place, x0);
    if (terms & kWantNext) {
      store_any(args.next, place.offset(args.next), place.n, next);
      if (args.next2.data != nullptr) store_any(args.next2, place.offset(args.next2), place.n, next);
    }
  }
}

template <class S>
int run(const LearnedStepArgs& args, void* stream) {
  if (!all_are(args.state, {&args.x, &args.noise, &args.known, &args.out, &args.x0})) return cudaErrorInvalidValue;
  LearnedParams<Arithmetic<S>> params{args, 0, {}};
  if (args.x0.data != nullptr) params.want |= kWantX0;
  if (args.next.data != nullptr) params.want |= kWantNext;
  if (args.mask.data != nullptr) params.want |= kTermMask;
  bool draws = args.seeds.data != nullptr;
  if (args.rows.table == nullptr) {
    params.row = make_row<Arithmetic<S>>(args.row, params.want, args);
    const bool by_address = (params.row.terms & kTermG) && args.noise.data == nullptr;
    draws = draws && (by_address || (params.row.terms & kTermKnownN));
  }
  const Access access = choose_access<S>(args.space, draws, args.x, args.m, args.v, args.noise, args.mask, args.known,
                                         args.out, args.x0, args.next, args.next2);
  const bool masked = args.mask.data != nullptr;
  return launch_elements<S>(args.space, access, stream, params, [masked](auto way) {
    return masked ? learned_step_kernel<S, decltype(way)::value, true>
                  : learned_step_kernel<S, decltype(way)::value, false>;
  });
}

}  // namespace

int learned_step(const LearnedStepArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  return for_dtype(args.state, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
