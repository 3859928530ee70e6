// The universal sampler step.
#include "../core/step.h"
#include "noise.cuh"

namespace dk::cuda {
namespace {

// A row as the kernel uses it: made on the host for a row by value, else by one thread of each block.
template <class T>
struct StepRow {
  StepCoefficients<T> k;
  uint32_t terms;
  uint64_t stream, known_stream;
};

template <class T>
struct StepParams {
  StepArgs args;
  uint32_t want;
  StepRow<T> row;  // if args.rows.table is nullptr
};

// Outputs are NaN: the row is not in the table, or reads an operand that is not there.
constexpr uint32_t kInvalid = 1u << 31;
constexpr uint32_t kWants = kWantX0 | kWantS | kWantNext;

constexpr uint32_t kReadsX = kTermP | kTermA | kTermSlopeA;
constexpr uint32_t kReadsM = kTermQ | kTermD | kTermSlopeD;
constexpr uint32_t kHistoryTerms = kTermE0 | kTermE0 << 1 | kTermE0 << 2 | kTermE0 << 3;
constexpr uint32_t kMaskTerms = kTermMask | kTermKnownS | kTermKnownN;

DK_HD bool lacks(uint32_t terms, const StepArgs& args) {
  bool lacking = (terms & kReadsX) && args.x.data == nullptr;
  lacking |= (terms & kReadsM) && args.u.data == nullptr;
  lacking |= (terms & kTermW) && args.c.data == nullptr;
  for (int k = 0; k < kHistories; ++k) lacking |= (terms & (kTermE0 << k)) && args.h[k].data == nullptr;
  lacking |= (terms & kTermKnownS) && args.known.data == nullptr;
  lacking |= (terms & kReadsNoise) && args.noise.data == nullptr && args.seeds.data == nullptr;
  lacking |= (terms & kTermKnownN) && args.seeds.data == nullptr;
  return lacking;
}

template <class T>
DK_HD StepRow<T> make_row(const double* values, uint32_t want, const StepArgs& args) {
  StepRow<T> row;
  row.k = step_coefficients<T>(values);
  row.terms = step_terms(values, want);
  row.stream = (row.terms & kReadsNoise) ? static_cast<uint64_t>(values[kStream]) : 0;
  row.known_stream = (row.terms & kTermKnownN) ? static_cast<uint64_t>(values[kKnownStream]) : 0;
  if (lacks(row.terms, args)) row.terms = kInvalid | (want & kWants);
  return row;
}

// kFull: with histories and a mask. Without, they cost no registers.
template <class S, Access access, bool kFull>
__global__ void __launch_bounds__(kThreads, kFull || access != Access::direct ? kMinBlocks : 2 * kMinBlocks)
    step_kernel(const StepParams<Arithmetic<S>> params) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  const StepArgs& args = params.args;
  __shared__ __align__(16) float staged[NoiseTile<S, access>::kRoom];
  __shared__ __align__(16) float staged_known[kFull ? NoiseTile<S, access>::kRoom : 4];
  __shared__ StepRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int tile = static_cast<int>(blockDim.x) * W * kChunks<S, access>;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tile, left = args.space.count - begin;

  StepRow<T> row;
  if (args.rows.table != nullptr) {
    if (threadIdx.x == 0) {
      const int64_t number = row_number(args.rows, b);
      shared_row = number < 0 ? StepRow<T>{{}, kInvalid | (params.want & kWants), 0, 0}
                              : make_row<T>(args.rows.table + number * kColumns, params.want, args);
    }
    __syncthreads();
    row = shared_row;
  } else {
    row = params.row;
  }
  const uint32_t terms = kFull ? row.terms : row.terms & ~(kHistoryTerms | kMaskTerms);

  const bool draws = (terms & kReadsNoise) && args.noise.data == nullptr;
  const uint64_t seed = draws || (terms & kTermKnownN) ? seed_of(args.seeds, b) : 0;
  if (access != Access::direct) {
    const int n = left < tile ? static_cast<int>(left) : tile;
    if (draws) stage_noise(args.space, seed, row.stream, begin, n, staged);
    if (kFull && (terms & kTermKnownN)) stage_noise(args.space, seed, row.known_stream, begin, n, staged_known);
  }

#pragma unroll 1
  for (int chunk = 0; chunk < kChunks<S, access>; ++chunk) {
    const int local = static_cast<int>(chunk * blockDim.x + threadIdx.x) * W;
    const Place<access> place(args.space, b, begin + local, W);
    if (place.n == 0) return;
    T x[W] = {}, u[W] = {}, c[W] = {}, h[kHistories][W] = {}, z[W] = {}, mask[W] = {}, known[W] = {}, z2[W] = {};
    if (terms & kReadsX) load_state<S>(args.x, place, x);
    if (terms & kReadsM) load_any(args.u, place.offset(args.u), place.n, u);
    if (terms & kTermW) load_any(args.c, place.offset(args.c), place.n, c);
    if (kFull) {
#pragma unroll
      for (int k = 0; k < kHistories; ++k) {
        if (terms & (kTermE0 << k)) load_state<S>(args.h[k], place, h[k]);
      }
      if (terms & kTermMask) load_any(args.mask, place.offset(args.mask), place.n, mask);
      if (terms & kTermKnownS) load_state<S>(args.known, place, known);
    }
    if (draws) {
      chunk_noise<access>(staged, seed, row.stream, place.first, local, z);
    } else if (terms & kReadsNoise) {
      load_state<S>(args.noise, place, z);
    }
    if (kFull && (terms & kTermKnownN)) {
      chunk_noise<access>(staged_known, seed, row.known_stream, place.first, local, z2);
    }

    T out[W], x0[W], s[W], next[W];
#pragma unroll
    for (int j = 0; j < W; ++j) {
      StepInputs<T> in{x[j], u[j], c[j], {h[0][j], h[1][j], h[2][j], h[3][j]}, z[j], mask[j], known[j], z2[j]};
      StepOutputs<T> o = step_element(row.k, terms, in);
      if (terms & kInvalid) o.x = o.x0 = o.s = o.next = not_a_number<T>();
      out[j] = o.x;
      x0[j] = o.x0;
      s[j] = o.s;
      next[j] = o.next;
    }
    store_state<S>(args.out, place, out);
    if (terms & kWantX0) store_state<S>(args.x0, place, x0);
    if (terms & kWantS) store_state<S>(args.s, place, s);
    if (terms & kWantNext) {
      store_any(args.next, place.offset(args.next), place.n, next);
      if (args.next2.data != nullptr) store_any(args.next2, place.offset(args.next2), place.n, next);
    }
  }
}

template <class S>
int run(const StepArgs& args, void* stream) {
  if (!all_are(args.state, {&args.x, &args.h[0], &args.h[1], &args.h[2], &args.h[3], &args.noise, &args.known,
                            &args.out, &args.x0, &args.s})) {
    return cudaErrorInvalidValue;
  }
  StepParams<Arithmetic<S>> params{args, 0, {}};
  if (args.x0.data != nullptr) params.want |= kWantX0;
  if (args.s.data != nullptr) params.want |= kWantS;
  if (args.next.data != nullptr) params.want |= kWantNext;
  if (args.mask.data != nullptr) params.want |= kTermMask;
  bool draws = args.seeds.data != nullptr;
  if (args.rows.table == nullptr) {
    params.row = make_row<Arithmetic<S>>(args.row, params.want, args);
    const bool by_address = (params.row.terms & kReadsNoise) && args.noise.data == nullptr;
    draws = draws && (by_address || (params.row.terms & kTermKnownN));
  }
  const Access access =
      choose_access<S>(args.space, draws, args.x, args.u, args.c, args.h[0], args.h[1], args.h[2], args.h[3],
                       args.noise, args.mask, args.known, args.out, args.x0, args.s, args.next, args.next2);
  bool full = args.mask.data != nullptr;
  for (const View& history : args.h) full = full || history.data != nullptr;
  return launch_elements<S>(args.space, access, stream, params, [full](auto way) {
    return full ? step_kernel<S, decltype(way)::value, true> : step_kernel<S, decltype(way)::value, false>;
  });
}

}  // namespace

int step(const StepArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  return for_dtype(args.state, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
