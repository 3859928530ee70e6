// The bridge: what csrc/bind hands to the kernels of csrc/cpu and csrc/cuda. Plain data, included by all sides.
#pragma once

#include "dtype.h"
#include "loss.h"
#include "step.h"
#include "variational.h"

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

struct RandnArgs {
  Space space;
  View out;
  Seeds seeds;
  uint64_t stream;
};

struct NoisingArgs {
  Space space;
  View x0, noise, out, target, eps;  // target, eps: may be absent
  Rows rows;
  Seeds seeds;
  uint64_t stream;
};

struct LossArgs {
  Space space;
  View pred, x0, noise, grad;  // grad: may be absent
  Rows rows;
  Seeds seeds;
  uint64_t stream;
  Reduction reduction;
  void* partials;  // [batch, ceil(count / kLossBlock)] float32 (float64 if x0 is)
  void* value;     // [batch], or [1] after a reduction over the batch
  void* samples;   // [batch] workspace of that reduction
};

struct VariationalArgs {
  Space space;
  View pred, w, x0, noise, grad, grad_w;  // w: second half of the channels, may be absent; grad, grad_w as pred, w
  Rows rows;
  Seeds seeds;
  uint64_t stream;
  Reduction reduction;
  void* partials;  // [batch, ceil(count / kLossBlock), 2] float32 (float64 if x0 is): squares and nats
  void* value;     // [batch], or [1] after a reduction over the batch
  void* means;     // [batch, 2]: mean d^2, mean bound in bits
  void* samples;   // [batch] workspace of that reduction
};

struct StepArgs {
  Space space;
  View x, u, c, h[kHistories], noise, mask, known;  // inputs, each may be absent
  View out, x0, s, next, next2;                     // outputs; out is always there. next2: second half of a [2B] next
  Dtype state;                                      // of x, h, noise, known, out, x0, s
  Rows rows;
  double row[kColumns];  // the row, if rows.table is nullptr
  Seeds seeds;
};

// The work is split into blocks of one sample each; [begin, end) counts blocks over the whole batch.
namespace cpu {
int64_t blocks_per_sample(const Space& space);
void randn(const RandnArgs& args, int64_t begin, int64_t end);
void noising(const NoisingArgs& args, int64_t begin, int64_t end);
void step(const StepArgs& args, int64_t begin, int64_t end);
void loss(const LossArgs& args, int64_t begin, int64_t end);
void loss_finish(const LossArgs& args);
void variational(const VariationalArgs& args, int64_t begin, int64_t end);
void variational_finish(const VariationalArgs& args);
void normals(uint64_t seed, uint64_t stream, uint64_t quad, int64_t quads, float* out);  // any counter, for tests
const char* isa_name();
const char* isa_best();
}  // namespace cpu

// Launchers: `stream` is a cudaStream_t, the result a cudaError_t. They never allocate, wait or throw.
namespace cuda {
int randn(const RandnArgs& args, void* stream);
int noising(const NoisingArgs& args, void* stream);
int step(const StepArgs& args, void* stream);
int loss(const LossArgs& args, void* stream);  // the whole loss: partials, samples and the batch
int variational(const VariationalArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
