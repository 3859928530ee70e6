// Group normalisation, forward: sums and squares of the blocks of every channel, their merge by a warp a group, then
// the elements. x is read twice, and once more from the cache for the squares of a block. Where a group of a sample
// fits into shared memory and there are groups for a whole card, a block does all of that for its group: the same sums
// in the same order, with x read once.
#include "group_norm.cuh"

namespace dk::cuda {
namespace {

// The sums of one partial, by a thread (last) or by a warp; x: its first element of this thread.
template <bool last, class S>
__device__ __forceinline__ void sum_partial(const GroupNormArgs& args, const S* x, const PartialPlace<last>& place) {
  using T = Arithmetic<S>;
  T sum = T(0);
  int64_t at = 0;
#pragma unroll 4
  for (int64_t i = place.first; i < place.n; i += place.every, at += place.step) sum = add(sum, T(decode(x[at])));
  sum = norm_gather<last>(sum);
  const T mean = div(sum, static_cast<T>(place.n));
  T squares = T(0);
  at = 0;
#pragma unroll 4
  for (int64_t i = place.first; i < place.n; i += place.every, at += place.step) {
    const T d = sub(T(decode(x[at])), mean);
    squares = fma(d, d, squares);
  }
  squares = norm_gather<last>(squares);
  if (last || norm_lane() == 0) {
    T* partial = norm_partial<T>(args, place.b, place.block, place.c);
    partial[0] = sum;
    partial[args.problem.channels] = squares;
  }
}

template <class S, bool last>
__global__ void __launch_bounds__(kNormThreads) sums_kernel(const GroupNormArgs args) {
  const PartialPlace<last> place(args.problem);
  if (!place.valid) return;  // a whole warp where lanes share a block
  sum_partial(args, static_cast<const S*>(args.x.data) + place.b * args.x.batch_stride + place.offset, place);
}

// Of a channel of this group: its sum, and its squares about the mean of the group.
template <class T>
struct ChannelSum {
  const GroupNormArgs* args;
  int64_t b;
  __device__ __forceinline__ double operator()(int64_t c) const {
    double sum = 0;
    for (int64_t k = 0; k < norm_blocks(args->problem); ++k) {
      sum = add(sum, static_cast<double>(norm_partial<T>(*args, b, k, c)[0]));
    }
    return norm_channel_sum(args->problem, sum, norm_given(args->add, b, c, 0.0, ReadChannel{}));
  }
};

template <class T>
struct ChannelSquares {
  const GroupNormArgs* args;
  int64_t b;
  double mean;
  __device__ __forceinline__ double operator()(int64_t c) const {
    const double center = sub(mean, norm_given(args->add, b, c, 0.0, ReadChannel{}));
    double squares = 0;
    for (int64_t k = 0; k < norm_blocks(args->problem); ++k) {
      const T* partial = norm_partial<T>(*args, b, k, c);
      const double n = static_cast<double>(norm_size(args->problem, k));
      squares = add(squares, norm_block_squares(n, div(1.0, n), static_cast<double>(partial[0]),
                                                static_cast<double>(partial[args->problem.channels]), center));
    }
    return squares;
  }
};

// Group `at` of the batch, by a warp.
template <class T>
__device__ __forceinline__ void finish_group(const GroupNormArgs& args, int64_t at) {
  const NormProblem& p = args.problem;
  const int64_t b = at / p.groups, width = norm_width(p), first = at % p.groups * width, end = first + width;
  const double mean = div(norm_sum(first, end, ChannelSum<T>{&args, b}), norm_count(p));
  const double squares = norm_sum(first, end, ChannelSquares<T>{&args, b, mean});
  const T mean_t = static_cast<T>(mean), rstd = static_cast<T>(norm_rstd(p, squares));
  if (norm_lane() == 0) {
    static_cast<T*>(args.mean)[at] = mean_t;
    static_cast<T*>(args.rstd)[at] = rstd;
  }
  for (int64_t c = first + norm_lane(); c < end; c += kNormLanes) {
    norm_set_affine(norm_factors<T>(args, b) + c, p.channels,
                    norm_affine_of(mean_t, rstd, norm_channel(args, b, c, ReadChannel{})));
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads) finish_kernel(const GroupNormArgs args) {
  const int64_t at = norm_warp();
  if (at < args.problem.batch * args.problem.groups) finish_group<T>(args, at);
}

template <bool active, class T, int W>
__device__ __forceinline__ void apply_chunk(const GroupNormArgs& args, int64_t b, int64_t c, T (&v)[W]) {
  const T* factors = norm_factors<T>(args, b);
#pragma unroll
  for (int j = 0; j < W; ++j) {
    v[j] =
        norm_value<active>(v[j], norm_factor(args, factors, kNormMean, c, j),
                           norm_factor(args, factors, kNormScale, c, j), norm_factor(args, factors, kNormOffset, c, j));
  }
}

template <class S, int W, bool active>
__global__ void __launch_bounds__(kNormThreads) apply_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  const ElementPlace<W> place(args.problem);
  if (!place.valid) return;
  T v[W];
  load_as<S>(args.x.data, place.b * args.x.batch_stride + place.first, W, v);
  apply_chunk<active>(args, place.b, place.c, v);
  store_as<S>(args.out.data, place.b * args.out.batch_stride + place.first, W, v);
}

template <class S, bool active>
int apply(const GroupNormArgs& args, void* stream) {
  return launch_norm_elements<S>(args, {&args.x, &args.out}, stream,
                                 [](auto width) { return apply_kernel<S, decltype(width)::value, active>; });
}

// ------------------------------------------------------------------------------------- a group of a sample a block
constexpr unsigned kWholeThreads = 256;
constexpr int64_t kWholeBytes = 48 << 10;  // of shared memory, which every card gives a block without being asked
constexpr int64_t kWholeGroups = 128;      // fewer leave multiprocessors of a large card idle

// A group of a sample in shared memory, in the order of x: few elements, whose numbers are 32-bit.
struct WholeGroup {
  int64_t b, first;         // sample, first channel
  int64_t begin;            // of the group's first element, in elements of the sample
  int width, inner, count;  // channels; of a run of neighbours in the sample; elements

  __device__ __forceinline__ explicit WholeGroup(const NormProblem& p)
      : b(blockIdx.x / p.groups),
        first(blockIdx.x % p.groups * norm_width(p)),
        begin(p.channels_last ? first : first * p.positions),
        width(static_cast<int>(norm_width(p))),
        inner(p.channels_last ? width : static_cast<int>(p.positions)),
        count(width * static_cast<int>(p.positions)) {}

  // Of element i: its place in the sample, its channel.
  __device__ __forceinline__ int64_t at(const NormProblem& p, int i) const {
    return begin + (p.channels_last ? i / inner * p.channels + i % inner : i);
  }
  __device__ __forceinline__ int64_t channel(const NormProblem& p, int i) const {
    return first + (p.channels_last ? i % inner : i / inner);
  }
};

template <bool last, class S>
__device__ __forceinline__ void sum_group(const GroupNormArgs& args, const WholeGroup& group, const S* tile) {
  constexpr int kUnit = last ? 1 : kNormLanes;  // threads of a partial
  const NormProblem& p = args.problem;
  const int count = static_cast<int>(norm_blocks(p)) * group.width;
  for (int k = static_cast<int>(threadIdx.x) / kUnit; k < count; k += static_cast<int>(kWholeThreads) / kUnit) {
    const int block = k / group.width, c = k % group.width;
    PartialPlace<last> place(p, group.b, block, group.first + c);
    const int position = block * static_cast<int>(norm_block(p)) + static_cast<int>(place.first);
    place.step = last ? group.width : kNormLanes;
    sum_partial(args, tile + (last ? position * group.width + c : c * group.inner + position), place);
  }
}

template <class S, int W>
__global__ void __launch_bounds__(kWholeThreads) whole_kernel(const GroupNormArgs args) {
  using T = Arithmetic<S>;
  extern __shared__ uint4 norm_memory[];
  S* tile = reinterpret_cast<S*>(norm_memory);
  const NormProblem& p = args.problem;
  const WholeGroup group(p);
  const int mine = static_cast<int>(threadIdx.x) * W, step = static_cast<int>(kWholeThreads) * W;
  const S* x = static_cast<const S*>(args.x.data) + group.b * args.x.batch_stride;
  for (int i = mine; i < group.count; i += step) {
    const S* from = x + group.at(p, i);
    if constexpr (W > 1) {
      norm_memory[i / W] = *reinterpret_cast<const uint4*>(from);
    } else {
      tile[i] = *from;
    }
  }
  __syncthreads();
  if (p.channels_last) {
    sum_group<true>(args, group, tile);
  } else {
    sum_group<false>(args, group, tile);
  }
  __syncthreads();
  if (threadIdx.x < kNormLanes) finish_group<T>(args, blockIdx.x);
  __syncthreads();
  for (int i = mine; i < group.count; i += step) {
    T v[W];
    load_as<S>(tile, i, W, v);
    if (p.silu) {
      apply_chunk<true>(args, group.b, group.channel(p, i), v);
    } else {
      apply_chunk<false>(args, group.b, group.channel(p, i), v);
    }
    store_as<S>(args.out.data, group.b * args.out.batch_stride + group.at(p, i), W, v);
  }
}

template <class S>
int64_t whole_bytes(const NormProblem& p) {
  return norm_width(p) * p.positions * static_cast<int64_t>(sizeof(S));
}

template <class S>
bool fits_whole(const NormProblem& p) {
  const int64_t groups = p.batch * p.groups;
  return groups >= kWholeGroups && groups <= 0x7fffffff && whole_bytes<S>(p) <= kWholeBytes;
}

template <class S>
int run_whole(const GroupNormArgs& args, void* stream) {
  constexpr int W = 16 / static_cast<int>(sizeof(S));
  const NormProblem& p = args.problem;
  const Shape shape{dim3(static_cast<unsigned>(p.batch * p.groups)), kWholeThreads,
                    static_cast<size_t>(whole_bytes<S>(p))};
  const bool vectors = norm_vectors(p, W, {&args.x, &args.out}) && (!p.channels_last || norm_width(p) % W == 0);
  return launch(vectors ? whole_kernel<S, W> : whole_kernel<S, 1>, shape, stream, args);
}

template <class S>
int run(const GroupNormArgs& args, void* stream) {
  const NormProblem& p = args.problem;
  if (p.batch == 0) return cudaSuccess;
  if (fits_whole<S>(p)) return run_whole<S>(args, stream);
  int status = launch_norm_partials(args, stream, [](auto last) { return sums_kernel<S, decltype(last)::value>; });
  if (status != cudaSuccess) return status;
  status = launch_norm(finish_kernel<Arithmetic<S>>, p.batch * p.groups, kNormWarps, stream, args);
  if (status != cudaSuccess) return status;
  return p.silu ? apply<S, true>(args, stream) : apply<S, false>(args, stream);
}

}  // namespace

int group_norm(const GroupNormArgs& args, void* stream) {
  return for_dtype(args.x.dtype, [&](auto s) { return run<decltype(s)>(args, stream); });
}

}  // namespace dk::cuda
