// Loads and stores of chunks: W neighbouring elements of a stored dtype <-> W values of the arithmetic type.
//
// Full chunks of more than one element are aligned (see is_aligned) and move in accesses of up to 16 bytes; the last
// chunk of a sample may hold fewer, which move one at a time. All arrays are indexed by constants after unrolling and
// live in registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "launch.cuh"

namespace dk::cuda {

template <class S>
using Arithmetic = std::conditional_t<std::is_same_v<S, double>, double, float>;

// ------------------------------------------------------------------------------------------------ one element
// As core/dtype.h has it, by instructions where the device has them.
template <class S>
__device__ __forceinline__ auto decode(S v) {
  return widen(v);
}
__device__ __forceinline__ float decode(Half v) { return __half2float(__ushort_as_half(v.bits)); }

__device__ __forceinline__ float to_f32(float v) { return v; }
__device__ __forceinline__ float to_f32(double v) { return __double2float_rn(v); }
template <class T, class S>
__device__ __forceinline__ void encode(T v, S& out) {
  narrow(v, out);
}
template <class T>
__device__ __forceinline__ void encode(T v, Half& out) {
  out = {__half_as_ushort(__float2half_rn(to_f32(v)))};
}
template <class T>
__device__ __forceinline__ void encode(T v, Bfloat16& out) {
  out = {__bfloat16_as_ushort(__float2bfloat16_rn(to_f32(v)))};
}

// Arithmetic type of a value from its decoded form.
__device__ __forceinline__ void assign(float& to, float v) { to = v; }
__device__ __forceinline__ void assign(double& to, float v) { to = v; }
__device__ __forceinline__ void assign(double& to, double v) { to = v; }
__device__ __forceinline__ void assign(float& to, double v) { to = __double2float_rn(v); }

// ----------------------------------------------------------------------------------------------- a chunk, stored
// Written as instructions: nvcc is free to merge a plain vector store with the one-at-a-time stores of a last chunk,
// and then there is no vector store left.
__device__ __forceinline__ void store_16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_8(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" : : "l"(__cvta_generic_to_global(to)), "r"(a), "r"(b) : "memory");
}

// W elements of S as 32-bit words.
template <class S, int W>
struct Chunk {
  static constexpr int kBytes = W * static_cast<int>(sizeof(S));
  static constexpr int kWords = (kBytes + 3) / 4;
  uint32_t word[kWords];

  __device__ __forceinline__ S element(int j) const {
    if constexpr (sizeof(S) == 8) {
      return __hiloint2double(static_cast<int>(word[2 * j + 1]), static_cast<int>(word[2 * j]));
    } else if constexpr (sizeof(S) == 4) {
      return bits_float(word[j]);
    } else if constexpr (sizeof(S) == 2) {
      return {static_cast<uint16_t>(word[j / 2] >> (16 * (j % 2)))};
    } else {
      return static_cast<uint8_t>(word[j / 4] >> (8 * (j % 4)));
    }
  }

  // The words start as 0.
  __device__ __forceinline__ void put(int j, S v) {
    if constexpr (sizeof(S) == 8) {
      word[2 * j] = static_cast<uint32_t>(__double2loint(v));
      word[2 * j + 1] = static_cast<uint32_t>(__double2hiint(v));
    } else if constexpr (sizeof(S) == 4) {
      word[j] = float_bits(v);
    } else if constexpr (sizeof(S) == 2) {
      word[j / 2] |= static_cast<uint32_t>(v.bits) << (16 * (j % 2));
    } else {
      word[j / 4] |= static_cast<uint32_t>(v) << (8 * (j % 4));
    }
  }
};

template <class S, int W>
__device__ __forceinline__ void load_chunk(const S* from, int n, Chunk<S, W>& chunk) {
  using C = Chunk<S, W>;
  if (W == 1 || n == W) {
    if constexpr (C::kBytes >= 16) {
#pragma unroll
      for (int k = 0; k < C::kBytes / 16; ++k) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[k];
        chunk.word[4 * k] = v.x;
        chunk.word[4 * k + 1] = v.y;
        chunk.word[4 * k + 2] = v.z;
        chunk.word[4 * k + 3] = v.w;
      }
    } else if constexpr (C::kBytes == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      chunk.word[0] = v.x;
      chunk.word[1] = v.y;
    } else if constexpr (C::kBytes == 4) {
      chunk.word[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (C::kBytes == 2) {
      chunk.word[0] = *reinterpret_cast<const uint16_t*>(from);
    } else {
      chunk.word[0] = *reinterpret_cast<const uint8_t*>(from);
    }
  } else {
#pragma unroll
    for (int k = 0; k < C::kWords; ++k) chunk.word[k] = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (j < n) chunk.put(j, from[j]);
    }
  }
}

template <class S, int W>
__device__ __forceinline__ void store_chunk(S* to, int n, const Chunk<S, W>& chunk) {
  using C = Chunk<S, W>;
  if (W == 1 || n == W) {
    if constexpr (C::kBytes >= 16) {
#pragma unroll
      for (int k = 0; k < C::kBytes / 16; ++k) {
        store_16(reinterpret_cast<uint4*>(to) + k, chunk.word[4 * k], chunk.word[4 * k + 1], chunk.word[4 * k + 2],
                 chunk.word[4 * k + 3]);
      }
    } else if constexpr (C::kBytes == 8) {
      store_8(to, chunk.word[0], chunk.word[1]);
    } else if constexpr (C::kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = chunk.word[0];
    } else {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(chunk.word[0]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      if (j < n) to[j] = chunk.element(j);
    }
  }
}

// ------------------------------------------------------------------------------------------- a chunk, decoded
template <class S, class T, int W>
__device__ __forceinline__ void load_as(const void* data, int64_t offset, int n, T (&v)[W]) {
  Chunk<S, W> chunk;
  load_chunk(static_cast<const S*>(data) + offset, n, chunk);
#pragma unroll
  for (int j = 0; j < W; ++j) assign(v[j], decode(chunk.element(j)));
}

template <class S, class T, int W>
__device__ __forceinline__ void store_as(void* data, int64_t offset, int n, const T (&v)[W]) {
  Chunk<S, W> chunk;
#pragma unroll
  for (int k = 0; k < Chunk<S, W>::kWords; ++k) chunk.word[k] = 0;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    S one;
    encode(v[j], one);
    chunk.put(j, one);
  }
  store_chunk(static_cast<S*>(data) + offset, n, chunk);
}

// The dtype is read at run time: model outputs and masks may have any, and the branch is the same for all threads.
template <class T, int W>
__device__ __forceinline__ void load_any(const View& view, int64_t offset, int n, T (&v)[W]) {
  switch (view.dtype) {
#define DK_LOAD(NAME, TYPE, TORCH) \
  case Dtype::NAME:                \
    return load_as<TYPE>(view.data, offset, n, v);
    DK_STORED_DTYPES(DK_LOAD)
#undef DK_LOAD
    case Dtype::u8:
      return load_as<uint8_t>(view.data, offset, n, v);
  }
}

template <class T, int W>
__device__ __forceinline__ void store_any(const View& view, int64_t offset, int n, const T (&v)[W]) {
  switch (view.dtype) {
#define DK_STORE(NAME, TYPE, TORCH) \
  case Dtype::NAME:                 \
    return store_as<TYPE>(view.data, offset, n, v);
    DK_STORED_DTYPES(DK_STORE)
#undef DK_STORE
    case Dtype::u8:
      return;  // masks are never written
  }
}

// ------------------------------------------------------------------------------------------------- positions
// One chunk of a sample: positions first .. first + n - 1.
template <Access access>
struct Place {
  int64_t sample, first;
  int n;
  int64_t at[kMaxDims];  // coordinates, for strided operands
  bool strided;

  __device__ __forceinline__ Place(const Space& space, int64_t b, int64_t position, int width)
      : sample(b), first(position), strided(false) {
    const int64_t left = space.count - position;
    n = left < width ? static_cast<int>(left < 0 ? 0 : left) : width;
    if constexpr (access == Access::scalar) {
      strided = space.layout == Layout::strided;
      if (strided) {
        if (space.count >> 32 == 0) {
          split<uint32_t>(space, position);
        } else {
          split<uint64_t>(space, position);
        }
      }
    }
  }

  template <class Index>
  __device__ __forceinline__ void split(const Space& space, int64_t position) {
    Index rest = static_cast<Index>(position);
#pragma unroll
    for (int d = kMaxDims - 1; d >= 0; --d) {
      at[d] = 0;
      if (d < space.dims) {
        const Index size = static_cast<Index>(space.size[d]);
        at[d] = rest % size;
        rest /= size;
      }
    }
  }

  __device__ __forceinline__ int64_t offset(const View& view) const {
    if constexpr (access == Access::scalar) {
      if (strided) {
        int64_t sum = sample * view.batch_stride;
#pragma unroll
        for (int d = 0; d < kMaxDims; ++d) sum += at[d] * view.stride[d];
        return sum;
      }
    }
    return sample * view.batch_stride + first;
  }
};

template <class S, Access access, class T, int W>
__device__ __forceinline__ void load_state(const View& view, const Place<access>& place, T (&v)[W]) {
  load_as<S>(view.data, place.offset(view), place.n, v);
}

template <class S, Access access, class T, int W>
__device__ __forceinline__ void store_state(const View& view, const Place<access>& place, const T (&v)[W]) {
  store_as<S>(view.data, place.offset(view), place.n, v);
}

}  // namespace dk::cuda
