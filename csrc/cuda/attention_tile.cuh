// Tiles of 16-bit matrices in shared memory, and the tensor-core instructions that eat them.
//
// A tile lies in shared memory as its matrix lies in global memory: rows of contiguous elements, cut into chunks of 8
// elements (16 bytes). ldmatrix with or without .trans then gives the operand of mma, whichever axis is contiguous.
#pragma once

#include "../core/attention.h"
#include "memory.cuh"

namespace dk::cuda {

constexpr int kChunk = 8;  // elements of 16 bits in a chunk

// ------------------------------------------------------------------------------------------------- shared memory
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void store_shared(uint32_t at, uint16_t v) {
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(at), "h"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float v) {
  asm volatile("st.shared.f32 [%0], %1;" : : "r"(at), "f"(v) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ float load_shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_shared_chunk(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// kRows x kChunks chunks. Chunks change places inside aligned groups of 2, 4 or 8, depending on the row, such that
// both eight rows of a column of chunks (ldmatrix) and eight neighbouring chunks (copies) touch every bank once.
template <int kRowCount, int kChunkCount>
struct Tile {
  static constexpr int kRows = kRowCount, kChunks = kChunkCount, kColumns = kChunks * kChunk;
  static constexpr int kPitch = kChunks * 16, kBytes = kRows * kPitch;
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kShift = kGroup == 8 ? 0 : kGroup == 4 ? 1 : 2;
  static_assert(kChunks % 2 == 0, "a column of chunks would hit few banks");

  uint32_t base;  // shared memory, 128-byte aligned

  static __device__ __forceinline__ uint32_t turn(int row) {
    return static_cast<uint32_t>(row >> kShift) & (kGroup - 1);
  }
  __device__ __forceinline__ uint32_t chunk(int row, int index) const {
    return base + static_cast<uint32_t>(row * kPitch) + ((static_cast<uint32_t>(index) ^ turn(row)) << 4);
  }
  __device__ __forceinline__ uint32_t element(int row, int column) const {
    return chunk(row, column / kChunk) + static_cast<uint32_t>(column % kChunk) * 2;
  }
};

// -------------------------------------------------------------------------------------------------- asynchronous
// copies One chunk, or zeros. sm_75 copies at once.
__device__ __forceinline__ void copy_chunk(uint32_t to, const uint16_t* from, bool there) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "{\n"
      ".reg .pred nothing;\n"
      "setp.eq.b32 nothing, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, nothing;\n"
      "}"
      :
      : "r"(to), "l"(__cvta_generic_to_global(from)), "r"(static_cast<uint32_t>(there))
      : "memory");
#else
  store_shared(to, there ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0));
#endif
}
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
// All but the last kPending groups have landed, as seen by the thread that issued them.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
#endif
}

// How the elements of a tile are reached in global memory.
enum class Reach : int32_t {
  chunks,   // rows are contiguous, 16-byte aligned and whole chunks
  columns,  // rows are contiguous, at any element offset
  rows,     // the other axis is contiguous: the copy transposes
};

// One head of an operand as rows and columns of a tile; strides in elements.
struct Matrix {
  uint16_t* data;
  int64_t row, column;
  Reach reach;
};

// What of a tile is there: `rows` x `columns` elements. Up to live_rows x live_columns (multiples of 8; the tile or
// less) the rest is 0, beyond that nobody looks.
struct Extent {
  int rows, columns, live_rows, live_columns;
};
// The same, from (first_row, first_column) of the matrix.
struct Window {
  int64_t first_row, first_column;
  int rows, columns, live_rows, live_columns;
};

__device__ __forceinline__ int clip(int64_t left, int most) {
  return left < most ? static_cast<int>(left < 0 ? 0 : left) : most;
}

// This thread, read anew: what a loop derives from it need not be kept in registers from round to round.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
  return thread;
}

// Where in the matrix, relative to the tile, the first chunk is that this thread copies.
template <class Tile>
__device__ __forceinline__ int64_t copy_offset(const Matrix& m, int thread) {
  return thread / Tile::kGroup * m.row + thread % Tile::kGroup * kChunk * m.column;
}

// The general copy: elements one at a time, which any strides and alignments allow; it waits for them. Neighbouring
// threads read along the axis that is contiguous.
template <class Tile>
__device__ __forceinline__ void copy_elements(Tile tile, const Matrix& m, const uint16_t* origin, const Extent& e,
                                              int threads, int thread) {
#pragma unroll 1
  for (int i = thread; i < Tile::kRows * Tile::kChunks; i += threads) {
    const int row = m.reach == Reach::rows ? i % Tile::kRows : i / Tile::kChunks;
    const int column = (m.reach == Reach::rows ? i / Tile::kRows : i % Tile::kChunks) * kChunk;
    if (row >= e.live_rows || column >= e.live_columns) continue;
    const uint16_t* from = origin + row * m.row + column * m.column;
    const int left = row < e.rows ? e.columns - column : 0;
    uint32_t word[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      if (j < left) word[j / 2] |= static_cast<uint32_t>(*from) << (16 * (j % 2));
      from += m.column;
    }
    store_shared(tile.chunk(row, column / kChunk), make_uint4(word[0], word[1], word[2], word[3]));
  }
}

// Global memory to a tile, by `threads` threads (a constant) of which this is number `thread`; `from` is the tile's
// origin plus copy_offset, for loops that move a pointer from tile to tile. Asynchronous where the reach is chunks:
// commit_copies, wait_copies and a barrier are the caller's.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile tile, const Matrix& m, const uint16_t* from, const Extent& e,
                                          int threads, int thread) {
  if (m.reach != Reach::chunks) {
    return copy_elements(tile, m, from - copy_offset<Tile>(m, thread), e, threads, thread);
  }
  const int pass = threads / Tile::kGroup, passes = (Tile::kRows + pass - 1) / pass;
  const int row0 = thread / Tile::kGroup, chunk0 = thread % Tile::kGroup;
  const uint32_t to = tile.chunk(row0, chunk0);  // eight rows further chunks lie in the same order
  const auto place = [&](int i, int j) { return to + static_cast<uint32_t>(i * pass * Tile::kPitch + j * 16); };
  if (e.rows >= Tile::kRows && e.columns >= Tile::kColumns && passes * pass == Tile::kRows) {  // all of it
#pragma unroll
    for (int i = 0; i < passes; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kChunks; j += Tile::kGroup) copy_chunk(place(i, j), from + j * kChunk, true);
      from += pass * m.row;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < passes; ++i) {
    const int row = row0 + i * pass;
#pragma unroll
    for (int j = 0; j < Tile::kChunks; j += Tile::kGroup) {
      const int column = (chunk0 + j) * kChunk;
      if (row < e.live_rows && column < e.live_columns) {
        copy_chunk(place(i, j), from + j * kChunk, row < e.rows && column < e.columns);
      }
    }
    from += pass * m.row;
  }
}
template <class Tile>
__device__ __forceinline__ void load_tile(Tile tile, const Matrix& m, const Window& w, int threads, int thread) {
  load_tile(tile, m, m.data + w.first_row * m.row + w.first_column * m.column + copy_offset<Tile>(m, thread),
            Extent{w.rows, w.columns, w.live_rows, w.live_columns}, threads, thread);
}

// A tile to global memory, only what is there. m.column is 1.
template <class Tile>
__device__ __forceinline__ void store_tile(Tile tile, const Matrix& m, const Window& w, int threads, int thread) {
  const int row0 = thread / Tile::kGroup, chunk0 = thread % Tile::kGroup;
#pragma unroll 1
  for (int row = row0; row < w.rows; row += threads / Tile::kGroup) {
    uint16_t* to = m.data + (w.first_row + row) * m.row + w.first_column;
#pragma unroll 1
    for (int column = chunk0 * kChunk; column < w.columns; column += Tile::kGroup * kChunk) {
      const uint4 v = load_shared_chunk(tile.chunk(row, column / kChunk));
      if (m.reach == Reach::chunks) {
        store_16(to + column, v.x, v.y, v.z, v.w);
      } else {
        const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (column + j < w.columns) to[column + j] = static_cast<uint16_t>(word[j / 2] >> (16 * (j % 2)));
        }
      }
    }
  }
}

// ----------------------------------------------------------------------------------------------------- ldmatrix
// The 16 x 16 elements at (row, chunk) of a tile as four 8 x 8 matrices in four registers; element (i, j) of a matrix
// is in lane 4 i + j / 2, with .trans in lane 4 j + i / 2.
enum class Order {
  down,    // upper left, lower left, upper right, lower right
  across,  // upper left, upper right, lower left, lower right
};

// mma's operands out of a tile:
//   a (m x k) from rows of m: down, plain          from rows of k: across, transposed
//   b (k x n) from rows of n: across, plain        from rows of k: down, transposed
// where the registers of b are those of columns 0..7 (2), then 8..15 (2).
template <class Tile, Order order, bool kTransposed>
struct Loader {
  uint32_t at, turned;

  __device__ __forceinline__ explicit Loader(Tile tile) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    const int row = (lane & 7) + 8 * (order == Order::down ? lane >> 3 & 1 : lane >> 4);
    const uint32_t chunk = static_cast<uint32_t>(order == Order::down ? lane >> 4 : lane >> 3 & 1);
    at = tile.base + static_cast<uint32_t>(row * Tile::kPitch);
    turned = (chunk ^ Tile::turn(row & 7)) << 4;
  }

  // row: a multiple of 8; chunk: even. Whole rows and groups of chunks are constants that the instruction adds.
  __device__ __forceinline__ void load(uint32_t (&r)[4], int row, int chunk) const {
    const int inside = chunk % Tile::kGroup;
    const uint32_t from = at + (static_cast<uint32_t>(inside * 16) ^ turned) +
                          static_cast<uint32_t>(row * Tile::kPitch + (chunk - inside) * 16);
    if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                   : "r"(from)
                   : "memory");
    }
  }
};

// ---------------------------------------------------------------------------------------------------------- mma
// c += a b for 16 x 16 times 16 x 8. Lane 4 i + j holds c(i, 2j), c(i, 2j + 1), c(i + 8, 2j), c(i + 8, 2j + 1).
template <class S>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void mma<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

template <>
__device__ __forceinline__ void mma<Bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __trap();  // attention_limit refuses bfloat16 here
#endif
}

// Two values rounded, the first in the low half.
template <class S>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}

// The registers of c for columns 0..7 and 8..15, rounded: a of the next product.
template <class S>
__device__ __forceinline__ void as_operand(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<S>(left[0], left[1]);
  a[1] = pack<S>(left[2], left[3]);
  a[2] = pack<S>(right[0], right[1]);
  a[3] = pack<S>(right[2], right[3]);
}

// ------------------------------------------------------------------------------------------------------ softmax
// Over the four lanes that hold one row of c.
__device__ __forceinline__ float row_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

}  // namespace dk::cuda
