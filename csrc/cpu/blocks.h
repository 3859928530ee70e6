// Walking over blocks: gives each span its operands as contiguous arrays of the arithmetic type T, straight from the
// tensor where it is stored that way, else through a buffer that stays in the L1 / L2 cache.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "isa.h"

namespace dk::cpu {

struct Block {
  int64_t sample;
  int64_t begin;  // first position within the sample
  int64_t n;
};

inline int64_t count_blocks(const Space& space) { return (space.count + kBlock - 1) / kBlock; }

inline Block block_at(const Space& space, int64_t index) {
  const int64_t per_sample = count_blocks(space);
  const int64_t sample = index / per_sample, begin = (index % per_sample) * kBlock;
  const int64_t left = space.count - begin;
  return {sample, begin, left < kBlock ? left : kBlock};
}

// Calls run(memory offset of the first element, elements, stride) for stretches of a strided block.
template <class F>
void for_stretches(const Space& space, const View& view, const Block& block, const F& run) {
  int64_t at[kMaxDims] = {};
  int64_t rest = block.begin;
  for (int d = space.dims - 1; d >= 0; --d) {
    at[d] = rest % space.size[d];
    rest /= space.size[d];
  }
  const int last = space.dims - 1;
  for (int64_t done = 0; done < block.n;) {
    int64_t offset = block.sample * view.batch_stride;
    for (int d = 0; d < space.dims; ++d) offset += at[d] * view.stride[d];
    int64_t n = space.size[last] - at[last];
    if (n > block.n - done) n = block.n - done;
    run(offset, done, n, view.stride[last]);
    done += n;
    at[last] += n;
    for (int d = last; d > 0 && at[d] == space.size[d]; --d) {
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

// Conversions of contiguous stretches between a stored dtype and the arithmetic type.
void widen(Dtype dtype, const void* in, float* out, int64_t n);
void widen(Dtype dtype, const void* in, double* out, int64_t n);
void narrow(const float* in, Dtype dtype, void* out, int64_t n);
void narrow(const double* in, Dtype dtype, void* out, int64_t n);

inline char* address(const View& view, int64_t offset) {
  return static_cast<char*>(view.data) + offset * size_of(view.dtype);
}

template <class T>
constexpr Dtype kDtypeOf = sizeof(T) == 8 ? Dtype::f64 : Dtype::f32;

// Is the block one stretch of T in memory?
template <class T>
bool is_direct(const Space& space, const View& view) {
  return space.layout != Layout::strided && view.dtype == kDtypeOf<T>;
}

void gather(const Space& space, const View& view, const Block& block, float* out);
void gather(const Space& space, const View& view, const Block& block, double* out);
void scatter(const Space& space, const View& view, const Block& block, const float* in);
void scatter(const Space& space, const View& view, const Block& block, const double* in);

// The block of an input: a pointer into the tensor, or `buffer` filled from it.
template <class T>
const T* load(const Space& space, const View& view, const Block& block, T* buffer) {
  if (is_direct<T>(space, view)) {
    return reinterpret_cast<const T*>(address(view, block.sample * view.batch_stride + block.begin));
  }
  gather(space, view, block, buffer);
  return buffer;
}

// Where a span may write the block of an output: the tensor itself, or `buffer` where it cannot or may not (`later`
// holds that very memory and is read after the first writes).
template <class T>
T* target(const Space& space, const View& view, const Block& block, T* buffer,
          std::initializer_list<const T*> later = {}) {
  if (view.data == nullptr || !is_direct<T>(space, view)) return buffer;
  T* direct = reinterpret_cast<T*>(address(view, block.sample * view.batch_stride + block.begin));
  for (const T* operand : later) {
    if (operand == direct) return buffer;
  }
  return direct;
}
// Brings a buffer that target() chose to the tensor.
template <class T>
void store(const Space& space, const View& view, const Block& block, const T* from, const T* buffer) {
  if (view.data != nullptr && from == buffer) scatter(space, view, block, from);
}

// Noise of a block by address, in the block's order. `buffer` has kNoiseRoom values.
constexpr int64_t kNoiseRoom = kBlock + 8 * kQuadsAtOnce;
const float* draw(const Space& space, const Block& block, uint64_t seed, uint64_t stream, float* buffer);
const double* draw(const Space& space, const Block& block, uint64_t seed, uint64_t stream, double* buffer);

// The same, asking for the memory of `views` (which the block reads or writes next) piece by piece between the normals,
// so that waiting for memory and computing overlap.
template <class T>
const T* draw_ahead(const Space& space, const Block& block, uint64_t seed, uint64_t stream, T* buffer,
                    std::initializer_list<const View*> views) {
  constexpr int64_t kPiece = 128, kLine = 64;
  if (space.layout != Layout::contiguous) return draw(space, block, seed, stream, buffer);
  for (int64_t done = 0; done < block.n; done += kPiece) {
    const Block piece{block.sample, block.begin + done, std::min(kPiece, block.n - done)};
    for (const View* view : views) {
      if (view->data == nullptr) continue;
      const char* from = address(*view, piece.sample * view->batch_stride + piece.begin);
      for (int64_t i = 0; i < piece.n * size_of(view->dtype); i += kLine) __builtin_prefetch(from + i);
    }
    draw(space, piece, seed, stream, buffer + done);
  }
  return buffer;
}

inline uint64_t seed_of(const Seeds& seeds, int64_t sample) {
  return static_cast<uint64_t>(seeds.data[sample * seeds.stride]);
}

}  // namespace dk::cpu
