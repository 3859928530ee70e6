// The bridge: what csrc/bind hands to the kernels of csrc/cpu and csrc/cuda, as far as ops share it. Plain data,
// included by all sides.
//
// An op's own arguments and the prototypes of its kernels stand in the header of the op. cpu::NAME(args, begin, end)
// runs blocks begin .. end - 1 of the whole batch (cpu.h), in any order and on any threads. cuda::NAME(args, stream)
// launches: `stream` is a cudaStream_t, the result a cudaError_t; it never allocates, waits or throws.
#pragma once

#include "dtype.h"

namespace dk {

constexpr int kMaxDims = 6;  // dimensions of a sample after neighbouring ones have been merged

// How positions of a sample map to memory.
enum class Layout : int32_t {
  contiguous,     // every operand: address = data + b batch_stride + i, i = logical index (row-major)
  channels_last,  // every operand: address = data + b batch_stride + p, p = i_inner C + c; logical i = c inner +
                  // i_inner
  strided,        // anything else: address from the strides, positions in logical order
};

struct Space {
  int64_t batch;  // samples
  int64_t count;  // elements of a sample
  Layout layout;
  int64_t channels;  // C of channels_last, else 1
  int32_t dims;      // of a sample
  int64_t size[kMaxDims];
};

// A tensor operand; data == nullptr: absent. Strides in elements.
struct View {
  void* data;
  Dtype dtype;
  int64_t batch_stride;
  int64_t stride[kMaxDims];
};

// The columns of a table are one list DK_..._COLUMNS(COLUMN) of COLUMN(number, name), in the header of the op: of it
// are made the enum of their numbers, and the names that Python reads (`diffkern._C.layout()`).
#define DK_COLUMN_NUMBER(NUMBER, NAME) NUMBER,
#define DK_COLUMN_NAME(NUMBER, NAME) NAME,

// Which row of a float64 table belongs to a sample. Without an index: row first + b step.
struct Rows {
  const double* table;  // [count, columns]; nullptr: the row travels in the arguments
  int64_t count;
  const void* index;  // int64 or int32, stride index_stride (0: one for all samples)
  int64_t index_stride;
  bool index_is_int32;
  int64_t first;
  int64_t step;
};

// Row number of sample b, or -1 if it is outside the table.
DK_HD int64_t row_number(const Rows& rows, int64_t b) {
  int64_t r = rows.first + b * rows.step;
  if (rows.index != nullptr) {
    const int64_t at = b * rows.index_stride;
    r = rows.index_is_int32 ? static_cast<const int32_t*>(rows.index)[at] : static_cast<const int64_t*>(rows.index)[at];
  }
  return r >= 0 && r < rows.count ? r : -1;
}

// Noise by address (seeds + stream) or as a tensor; both absent: no noise.
struct Seeds {
  const int64_t* data;
  int64_t stride;
};

}  // namespace dk
