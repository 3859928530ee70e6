// Quantiles and thresholds by counting digits. A small sample takes one block of threads from the first pass to the
// thresholded values; the parts of a large one are counted by many blocks, and between the passes one block a sample
// walks the counts. Nothing is read back: what has been selected stays on the device.
#include "../core/quantile.h"
#include "memory.cuh"

namespace dk::cuda {
namespace {

constexpr unsigned kSelectThreads = 512, kWarps = kSelectThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

using Count = unsigned long long;  // of a sample in many blocks
static_assert(sizeof(Count) == 8 && sizeof(Selected) % 8 == 0, "the workspace is made of words of 8 bytes");

__device__ __forceinline__ Count* counts_of(const QuantileArgs& args, int64_t b) {
  return static_cast<Count*>(args.workspace) + b * kCounts;
}
__device__ __forceinline__ Selected* selected_of(const QuantileArgs& args, int64_t b) {
  return reinterpret_cast<Selected*>(static_cast<Count*>(args.workspace) + args.space.batch * kCounts) + b;
}

// Calls use(x[], place) for the chunks of positions begin .. end - 1, which are whole chunks unless the sample ends.
template <class S, Access access, class Use>
__device__ __forceinline__ void for_chunks(const QuantileArgs& args, int64_t b, int64_t begin, int64_t end, Use use) {
  constexpr int W = kWidth<S, access>;
  for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * W; at < end;
       at += static_cast<int64_t>(blockDim.x) * W) {
    const Place<access> place(args.space, b, at, W);
    Arithmetic<S> x[W];
    load_state<S>(args.x, place, x);
    use(x, place);
  }
}

// Adds the digits of a pass to the counts in shared memory.
template <class S, Access access>
__device__ __forceinline__ void count(const QuantileArgs& args, int64_t b, int64_t begin, int64_t end, int pass,
                                      const Selected& selected, uint32_t* counts) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  const int before = pass == 0 ? 0 : shift_of<T>(pass - 1), shift = shift_of<T>(pass);
  const Key<T> mask = static_cast<Key<T>>(digit_values<T>(pass) - 1);
  const Key<T> lower = static_cast<Key<T>>(selected.lower.prefix), upper = static_cast<Key<T>>(selected.upper.prefix);
  for_chunks<S, access>(args, b, begin, end, [&](const T(&x)[W], const Place<access>& place) {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (j >= place.n) continue;
      const Key<T> key = key_of(x[j]), top = key >> before;
      const bool is_lower = pass == 0 || top == lower;
      if (is_lower || top == upper) {
        atomicAdd(counts + (is_lower ? 0 : kSecond) + static_cast<int>((key >> shift) & mask), 1u);
      }
    }
  });
}

// Counters that a pass uses.
template <class T>
__device__ __forceinline__ int used_counts(int pass) {
  return pass == 0 ? digit_values<T>(0) : kSecond + digit_values<T>(pass);
}

// The sum of `values` counters by each warp, for one of the two ranks; in every lane.
template <class Counter>
__device__ __forceinline__ int64_t sum_of_warp(const Counter* counts, int per_warp) {
  int64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x % 32); i < per_warp; i += 32) sum += static_cast<int64_t>(counts[i]);
#pragma unroll
  for (int half = 16; half > 0; half /= 2) sum += __shfl_xor_sync(kAll, sum, half);
  return sum;
}

// Walks the counters of this warp to the rank, if it is among them; `rest` is what is left of it before them.
template <class Counter>
__device__ __forceinline__ void walk(const Counter* counts, int per_warp, int64_t rest, int first, int bits,
                                     Selection& selection) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int begin = 0; begin < per_warp; begin += 32) {
    const int64_t own = begin + lane < per_warp ? static_cast<int64_t>(counts[begin + lane]) : 0;
    int64_t sum = own;  // of the lanes up to this one
#pragma unroll
    for (int half = 1; half < 32; half *= 2) {
      const int64_t lower = __shfl_up_sync(kAll, sum, static_cast<unsigned>(half));
      if (lane >= half) sum += lower;
    }
    const unsigned reached = __ballot_sync(kAll, sum > rest);
    if (reached != 0) {
      if (lane == __ffs(static_cast<int>(reached)) - 1) {
        selection.prefix = selection.prefix << bits | static_cast<uint64_t>(first + begin + lane);
        selection.rank = rest - (sum - own);
      }
      return;
    }
    rest -= __shfl_sync(kAll, sum, 31);
  }
}

// One digit of both ranks from the counts, by one block of kSelectThreads; `selected` and `sums` are shared memory, and
// so may the counts be. The caller waits before it reads `selected`, and before `sums` are used again.
template <class T, class Counter>
__device__ __forceinline__ void pick(const Counter* counts, int pass, Selected& selected, int64_t (&sums)[2][kWarps]) {
  const int bits = digit_bits<T>(pass), per_warp = digit_values<T>(pass) / static_cast<int>(kWarps);
  const int warp = static_cast<int>(threadIdx.x / 32), first = warp * per_warp;
  const Selected old = selected;
  const Counter* part[2] = {counts + first, counts + first + (old.lower.prefix != old.upper.prefix ? kSecond : 0)};
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int64_t sum = sum_of_warp(part[k], per_warp);
    if (threadIdx.x % 32 == 0) sums[k][warp] = sum;
  }
  __syncthreads();
  if (pass == 0 && threadIdx.x == 0) selected.nan = counts[digit_values<T>(0) - 1] != 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    int64_t rest = k == 0 ? old.lower.rank : old.upper.rank;
    for (int w = 0; w < warp; ++w) rest -= sums[k][w];
    if (rest >= 0 && rest < sums[k][warp]) {
      walk(part[k], per_warp, rest, first, bits, k == 0 ? selected.lower : selected.upper);
    }
  }
}

template <class S, Access access>
__device__ __forceinline__ void apply(const QuantileArgs& args, int64_t b, int64_t begin, int64_t end,
                                      Arithmetic<S> quantile) {
  using T = Arithmetic<S>;
  constexpr int W = kWidth<S, access>;
  const T s = threshold_of(quantile, static_cast<T>(args.maximum));
  for_chunks<S, access>(args, b, begin, end, [&](T(&x)[W], const Place<access>& place) {
#pragma unroll
    for (int j = 0; j < W; ++j) x[j] = thresholded(x[j], s);
    store_state<S>(args.out, place, x);
  });
}

// ------------------------------------------------------------------------------------------ small samples, one block
template <class S, Access access>
__global__ void __launch_bounds__(kSelectThreads, 2) whole_kernel(const QuantileArgs args) {
  using T = Arithmetic<S>;
  __shared__ uint32_t counts[kCounts];
  __shared__ int64_t sums[2][kWarps];
  __shared__ Selected selected;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  if (threadIdx.x == 0) selected = select_from(args);
  for (int pass = 0; pass < kQuantilePasses<T>; ++pass) {
    for (int i = static_cast<int>(threadIdx.x); i < used_counts<T>(pass); i += static_cast<int>(kSelectThreads)) {
      counts[i] = 0;
    }
    __syncthreads();
    count<S, access>(args, b, 0, args.space.count, pass, selected, counts);
    __syncthreads();
    pick<T>(counts, pass, selected, sums);
    __syncthreads();
  }
  const T quantile = quantile_value<T>(args, selected);
  if (threadIdx.x == 0) static_cast<T*>(args.value)[b] = quantile;
  if (args.out.data != nullptr) apply<S, access>(args, b, 0, args.space.count, quantile);
}

// ---------------------------------------------------------------------------------------- large samples, many blocks
__global__ void __launch_bounds__(kSelectThreads) start_kernel(const QuantileArgs args) {
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  Count* counts = counts_of(args, b);
  for (int i = static_cast<int>(threadIdx.x); i < kCounts; i += static_cast<int>(kSelectThreads)) counts[i] = 0;
  if (threadIdx.x == 0) *selected_of(args, b) = select_from(args);
}

// Elements of a block: enough that adding its counts to those of the sample costs little.
constexpr int64_t kBlockPart = kQuantilePart / 4;

struct PassArgs {
  QuantileArgs quantile;
  int pass;
};

template <class S, Access access>
__global__ void __launch_bounds__(kSelectThreads) count_kernel(const PassArgs p) {
  using T = Arithmetic<S>;
  __shared__ uint32_t counts[kCounts];
  __shared__ Selected selected;
  const QuantileArgs& args = p.quantile;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlockPart, rest = args.space.count - begin;
  if (threadIdx.x == 0) selected = *selected_of(args, b);
  const int used = used_counts<T>(p.pass);
  for (int i = static_cast<int>(threadIdx.x); i < used; i += static_cast<int>(kSelectThreads)) counts[i] = 0;
  __syncthreads();
  count<S, access>(args, b, begin, begin + (rest < kBlockPart ? rest : kBlockPart), p.pass, selected, counts);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < used; i += static_cast<int>(kSelectThreads)) {
    if (counts[i] != 0) atomicAdd(counts_of(args, b) + i, static_cast<Count>(counts[i]));
  }
}

template <class T>
__global__ void __launch_bounds__(kSelectThreads) pick_kernel(const PassArgs p) {
  __shared__ int64_t sums[2][kWarps];
  __shared__ Selected selected;
  const QuantileArgs& args = p.quantile;
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  Count* counts = counts_of(args, b);
  if (threadIdx.x == 0) selected = *selected_of(args, b);
  __syncthreads();
  pick<T>(counts, p.pass, selected, sums);
  __syncthreads();
  const int used = used_counts<T>(p.pass);
  for (int i = static_cast<int>(threadIdx.x); i < used; i += static_cast<int>(kSelectThreads)) counts[i] = 0;
  if (threadIdx.x == 0) {
    *selected_of(args, b) = selected;
    if (p.pass + 1 == kQuantilePasses<T>) static_cast<T*>(args.value)[b] = quantile_value<T>(args, selected);
  }
}

template <class S, Access access>
__global__ void __launch_bounds__(kSelectThreads) threshold_kernel(const QuantileArgs args) {
  const int64_t b = block_sample();
  if (b >= args.space.batch) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlockPart, rest = args.space.count - begin;
  apply<S, access>(args, b, begin, begin + (rest < kBlockPart ? rest : kBlockPart),
                   static_cast<const Arithmetic<S>*>(args.value)[b]);
}

template <class S, Access access>
int run(const QuantileArgs& args, void* stream) {
  using T = Arithmetic<S>;
  Shape sample, parts;  // a block a sample, and a block a part
  const int64_t blocks = (args.space.count + kBlockPart - 1) / kBlockPart;
  if (!make_shape(args.space.batch, 1, 1, kSelectThreads, sample) || blocks > 0x7fffffff) {
    return cudaErrorInvalidConfiguration;
  }
  sample.threads = kSelectThreads;
  parts = sample;
  parts.grid.x = static_cast<unsigned>(blocks);
  if (quantile_workspace(args.space) == 0) return launch(whole_kernel<S, access>, sample, stream, args);
  int status = launch(start_kernel, sample, stream, args);
  for (int pass = 0; status == cudaSuccess && pass < kQuantilePasses<T>; ++pass) {
    const PassArgs p{args, pass};
    status = launch(count_kernel<S, access>, parts, stream, p);
    if (status == cudaSuccess) status = launch(pick_kernel<T>, sample, stream, p);
  }
  if (status == cudaSuccess && args.out.data != nullptr) {
    status = launch(threshold_kernel<S, access>, parts, stream, args);
  }
  return status;
}

template <class S>
int run(const QuantileArgs& args, void* stream) {
  if (args.space.batch == 0 || args.space.count == 0) return cudaSuccess;
  if (args.out.data != nullptr && args.out.dtype != args.x.dtype) return cudaErrorInvalidValue;
  return choose_access<S>(args.space, false, args.x, args.out) == Access::scalar ? run<S, Access::scalar>(args, stream)
                                                                                 : run<S, Access::direct>(args, stream);
}

}  // namespace

int64_t quantile_workspace(const Space& space) {
  if (space.count <= kQuantilePart) return 0;
  return space.batch * static_cast<int64_t>(kCounts * sizeof(Count) + sizeof(Selected));
}

int quantile(const QuantileArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
