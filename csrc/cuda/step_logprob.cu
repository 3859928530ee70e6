// The log-density of a sampler step and its gradient, summed in the order of core/ordered_sum.h: one block of
// threads makes the partial sum of kSumBlock elements.
#include "../core/step_logprob.h"
#include "ordered_sum.cuh"

namespace dk::cuda {
namespace {

constexpr uint32_t kHistoryTerms = kTermE0 | kTermE0 << 1 | kTermE0 << 2 | kTermE0 << 3;

// A row as the kernel uses it: made on the host for a row by value, else by one thread of each block.
template <class T>
struct DensityRow {
  LogprobRow<T> k;
  bool invalid;  // outputs are NaN: not in the table, no such Gaussian, or an operand that it reads is not there
};

template <class T>
struct DensityParams {
  StepLogprobArgs args;
  DensityRow<T> row;  // if args.rows.table is nullptr
};

template <class T>
DK_HD void make_row(const double* values, const StepLogprobArgs& args, DensityRow<T>& row) {
  logprob_row(values, args.learned, args.space.count, row.k);
  const uint32_t terms = args.space.count == 0 ? 0 : row.k.terms;  // an empty tensor has no address
  row.invalid = logprob_excludes(values, args.learned);
  row.invalid |= (terms & (kTermP | kTermA)) && args.x.data == nullptr;
  row.invalid |= (terms & (kTermQ | kTermD)) && args.u.data == nullptr;
  row.invalid |= (terms & kTermW) && args.c.data == nullptr;
  row.invalid |= row.k.r1 != T(0) && args.v.data == nullptr && args.space.count > 0;
  for (int k = 0; k < kHistories; ++k) row.invalid |= (terms & (kTermE0 << k)) && args.h[k].data == nullptr;
}

// To shared memory, so that few values are alive at a time.
template <class T>
__device__ void find_row(const StepLogprobArgs& args, int64_t b, DensityRow<T>& row) {
  const int64_t number = row_number(args.rows, b);
  if (number >= 0) {
    make_row(args.rows.table + number * logprob_columns(args.learned), args, row);
  } else {
    row.k = {};
    row.invalid = true;
  }
}

// What a kernel has registers for.
enum class Form {
  plain,
  full,     // with histories
  learned,  // with a variance beside the mean, without histories
};

template <class S, Access access, Form form>
__global__ void __launch_bounds__(kSumThreads<S, access>, form == Form::full ? kMinBlocks : 3)
    density_kernel(const DensityParams<Arithmetic<S>> params) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  constexpr bool learned = form == Form::learned, kFull = form == Form::full;
  const StepLogprobArgs& args = params.args;
  __shared__ __align__(16) T energies[kSumBlock];
  __shared__ DensityRow<T> shared_row;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kSumBlock;
  const bool by_value = args.rows.table == nullptr;
  if (!by_value) {
    if (threadIdx.x == 0) find_row(args, b, shared_row);
    __syncthreads();
  }
  const DensityRow<T> row = by_value ? params.row : shared_row;
  const uint32_t terms = row.invalid ? 0 : row.k.terms & (kFull ? ~0u : ~kHistoryTerms);
  const bool reads = row.k.random && !row.invalid;
#pragma unroll 1
  for (int c = 0; c < kHeld<S, access>; ++c) {
    const int local = (c * kSumThreads<S, access> + static_cast<int>(threadIdx.x)) * W;
    const Place<access> place(args.space, b, begin + local, W);
    T after[W] = {}, x[W] = {}, u[W] = {}, cond[W] = {}, v[W] = {}, h[kHistories][W] = {}, energy[W];
    if (place.n > 0) {
      if (reads) load_state<S>(args.after, place, after);
      if (terms & (kTermP | kTermA)) load_state<S>(args.x, place, x);
      if (terms & (kTermQ | kTermD)) load_any(args.u, place.offset(args.u), place.n, u);
      if (terms & kTermW) load_any(args.c, place.offset(args.c), place.n, cond);
      if (learned && reads && row.k.r1 != T(0)) load_any(args.v, place.offset(args.v), place.n, v);
      if (kFull) {
#pragma unroll
        for (int k = 0; k < kHistories; ++k) {
          if (terms & (kTermE0 << k)) load_state<S>(args.h[k], place, h[k]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const StepInputs<T> in{x[j], u[j], cond[j], {h[0][j], h[1][j], h[2][j], h[3][j]}, T(0), T(0), T(0), T(0)};
      const StepOutputs<T> mean = step_element(row.k.step, terms, in);
      LogprobElement<T> element = logprob_element<learned>(row.k, after[j], mean.x, mean.x0, v[j]);
      if (!row.k.random) element = {T(0), T(0), T(0)};
      if (row.invalid) element.energy = element.by_m = element.by_v = not_a_number<T>();
      energy[j] = j < place.n ? element.energy : T(0);
      v[j] = element.by_v;
      GuidedGradient<T> parts = guided_gradient(row.k, element.by_m);
      if (row.invalid) parts.c = element.by_m;
      u[j] = parts.u;
      cond[j] = parts.c;
    }
    store_squares(energies, local, energy);
    if (place.n > 0 && args.grad_u.data != nullptr) {
      store_any(args.grad_u, place.offset(args.grad_u), place.n, u);
      if (args.grad_c.data != nullptr) store_any(args.grad_c, place.offset(args.grad_c), place.n, cond);
      if (args.grad_v.data != nullptr) store_any(args.grad_v, place.offset(args.grad_v), place.n, v);
    }
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const T sum = fold_warp(fold<kSumBlock, 32>(energies + threadIdx.x));
    if (threadIdx.x == 0) static_cast<T*>(args.partials)[b * gridDim.x + blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kSumLanes) density_samples_kernel(const DensityParams<T> params) {
  __shared__ T lanes[kSumLanes];
  const StepLogprobArgs& args = params.args;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t blocks = sum_blocks(args.space.count);
  const T energies = ordered_sum(static_cast<const T*>(args.partials) + b * blocks, blocks, lanes);
  if (threadIdx.x == 0) {
    DensityRow<T> row = params.row;
    if (args.rows.table != nullptr) find_row(args, b, row);
    static_cast<T*>(args.value)[b] = row.invalid ? not_a_number<T>() : logprob_value(row.k, energies);
  }
}

template <class S>
int run(const StepLogprobArgs& args, void* stream) {
  using T = Arithmetic<S>;
  if (!all_are(args.state, {&args.after, &args.x, &args.h[0], &args.h[1], &args.h[2], &args.h[3]})) {
    return cudaErrorInvalidValue;
  }
  const Space& space = args.space;
  if (space.batch == 0) return cudaSuccess;
  DensityParams<T> params{args, {}};
  if (args.rows.table == nullptr) make_row(args.row, args, params.row);
  int status = cudaSuccess;
  if (space.count > 0) {
    const Access access = choose_access<S>(space, false, args.after, args.x, args.u, args.c, args.v, args.h[0],
                                           args.h[1], args.h[2], args.h[3], args.grad_u, args.grad_c, args.grad_v);
    bool full = false;
    for (const View& history : args.h) full = full || history.data != nullptr;
    status = launch_partials<S, false>(space, access, stream, params, [&](auto way) {
      constexpr Access kWay = decltype(way)::value;
      return args.learned ? density_kernel<S, kWay, Form::learned>
             : full       ? density_kernel<S, kWay, Form::full>
                          : density_kernel<S, kWay, Form::plain>;
    });
  }
  return status == cudaSuccess ? launch_samples(density_samples_kernel<T>, space.batch, stream, params) : status;
}

}  // namespace

int step_logprob(const StepLogprobArgs& args, void* stream) {
  return for_dtype(args.state, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
