// Grids, and the choice between the ways a kernel reaches memory.
#pragma once

#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "../core/args.h"

namespace dk::cuda {

// How the threads of a block reach the positions of a sample (a position is an index in memory order).
enum class Access {
  direct,  // 16-byte chunks of logical order: a chunk is whole quads, noise stays in registers
  staged,  // 16-byte chunks of memory order: noise, if any, comes through shared memory
  scalar,  // one element at a time, any strides and alignment: noise comes through shared memory
};

constexpr unsigned kThreads = 256;
// Blocks on a multiprocessor that ptxas must leave registers for: up to 128 a thread. Said explicitly, because without
// it ptxas spills a few to reach a higher occupancy.
constexpr unsigned kMinBlocks = 2;

// Elements of a chunk (one access of one thread).
template <class S, Access access>
constexpr int kWidth = access == Access::scalar ? 1 : 16 / static_cast<int>(sizeof(S));

// Chunks of a thread; chunk k of thread t is at (k blockDim + t) kWidth, so that a warp touches neighbouring addresses.
template <class S, Access access>
constexpr int kChunks = access == Access::scalar ? 4 : 1;

// Sample of this block; may be >= batch in the last slice of the grid.
__device__ __forceinline__ int64_t block_sample() { return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y; }

// ------------------------------------------------------------------------------- choices that make a kernel's types
// use(s) with a value of the type in which a dtype is stored. Masks have no kernels of their own.
template <class Use>
int for_dtype(Dtype dtype, const Use& use) {
  switch (dtype) {
#define DK_USE(NAME, TYPE, TORCH) \
  case Dtype::NAME:               \
    return use(TYPE{});
    DK_STORED_DTYPES(DK_USE)
#undef DK_USE
    case Dtype::u8:
      break;
  }
  return cudaErrorInvalidValue;
}

// use(way) with the access as a type, decltype(way)::value. Two doubles are no quad of noise: float64 has no direct
// access. Without noise nothing else is staged.
template <class S, bool kNoise, class Use>
int for_access(Access access, const Use& use) {
  if (access == Access::scalar) return use(std::integral_constant<Access, Access::scalar>{});
  if constexpr (sizeof(S) != 8) {
    if (!kNoise || access == Access::direct) return use(std::integral_constant<Access, Access::direct>{});
  }
  if constexpr (sizeof(S) == 8 || kNoise) return use(std::integral_constant<Access, Access::staged>{});
}

// Have all operands that are there this dtype?
inline bool all_are(Dtype dtype, std::initializer_list<const View*> views) {
  for (const View* view : views) {
    if (view->data != nullptr && view->dtype != dtype) return false;
  }
  return true;
}

// ------------------------------------------------------------------------------------------------------- launches
struct Shape {
  dim3 grid;
  unsigned threads;
  size_t shared = 0;  // bytes of dynamic shared memory, at most 48 KiB
};

inline unsigned slices(int64_t batch) { return static_cast<unsigned>((batch + 65534) / 65535); }

// Blocks of at most kThreads threads with `per_thread` elements each; false: more than a grid can have.
inline bool make_shape(int64_t batch, int64_t count, int per_thread, unsigned threads, Shape& shape) {
  const int64_t wanted = (count + per_thread - 1) / per_thread;
  if (wanted < threads) threads = static_cast<unsigned>(wanted + 31) / 32 * 32;
  if (threads == 0) threads = 32;
  const int64_t tile = static_cast<int64_t>(threads) * per_thread;
  const int64_t tiles = count > 0 ? (count + tile - 1) / tile : 1;
  const unsigned z = slices(batch);
  if (tiles > 0x7fffffff || batch > int64_t{65535} * 65535) return false;
  shape.threads = threads;
  shape.grid = dim3(static_cast<unsigned>(tiles), static_cast<unsigned>((batch + z - 1) / z), z);
  return true;
}

// Can chunks of `width` elements of this operand be moved in accesses of up to 16 bytes?
inline bool is_aligned(const View& view, int64_t batch, int width) {
  if (view.data == nullptr) return true;
  const int64_t bytes = width * size_of(view.dtype), unit = bytes < 16 ? bytes : 16;
  return reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(unit) == 0 &&
         (batch <= 1 || view.batch_stride * size_of(view.dtype) % unit == 0);
}

// `draws`: noise by address may be wanted, so positions that are not in logical order need staging.
template <class S, class... Views>
Access choose_access(const Space& space, bool draws, const Views&... views) {
  constexpr int width = 16 / static_cast<int>(sizeof(S));
  if (space.layout == Layout::strided || !(is_aligned(views, space.batch, width) && ...)) return Access::scalar;
  const bool reordered = space.layout == Layout::channels_last && space.channels != 1 && space.channels != space.count;
  return width % 4 != 0 || (draws && reordered) ? Access::staged : Access::direct;
}

// One launch. Reports its own error only, and leaves none behind for the next caller of cudaGetLastError.
template <class Params>
int launch(void (*kernel)(Params), const Shape& shape, void* stream, const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  const cudaError_t status = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), shape.grid, dim3(shape.threads),
                                              arguments, shape.shared, static_cast<cudaStream_t>(stream));
  if (status != cudaSuccess) cudaGetLastError();
  return status;
}

// One launch over all elements; kernel_of(way) is the kernel of an access (for_access).
template <class S, class Params, class KernelOf>
int launch_elements(const Space& space, Access access, void* stream, const Params& params, const KernelOf& kernel_of) {
  Shape shape;
  const int per_thread = access == Access::scalar ? kChunks<S, Access::scalar> : kWidth<S, Access::direct>;
  if (!make_shape(space.batch, space.count, per_thread, kThreads, shape)) return cudaErrorInvalidConfiguration;
  return for_access<S, true>(access, [&](auto way) { return launch(kernel_of(way), shape, stream, params); });
}

}  // namespace dk::cuda
