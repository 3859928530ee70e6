// A linear layer whose rows do not know of each other.
//
//   y[r, c] = b[c] + sum_k act(x[r, k]) w[c, k],  act(u) = u sigmoid(u), or u
//
// The bits of a row do not depend on how many there are, on its place, on threads or the device: lane j of
// kLinearLanes adds the products of k = j, j + kLinearLanes, ... in turn, a fma each, beginning with 0; the lanes are
// folded (lane + 8, + 4, + 2, + 1), the bias is added, and the sum is rounded once where it is stored.
#pragma once

#include "args.h"
#include "silu.h"

namespace dk {

constexpr int kLinearLanes = 16;

// Rows of neighbours, `stride` elements apart.
struct RowsView {
  void* data;
  int64_t stride;
};

// All tensors have one dtype; T is float32 (float64 for float64).
struct LinearRowsArgs {
  int64_t rows, inputs, outputs;
  Dtype dtype;
  bool silu;
  RowsView x, weight, out;  // [rows, inputs], [outputs, inputs], [rows, outputs]
  void* bias;               // [outputs], nullptr: none
  int64_t bias_stride;
  void* prepared;  // [rows, inputs] of T for act(x); nullptr: x is read as it lies
};

// Of lanes that have been folded once, lane + 8.
template <class T>
DK_HD T linear_fold(const T* l) {
  return add(add(add(l[0], l[4]), add(l[2], l[6])), add(add(l[1], l[5]), add(l[3], l[7])));
}

namespace cpu {
// Whether x must be prepared: the kernels of the CPU read T.
bool linear_rows_prepares(const LinearRowsArgs& args);
int64_t linear_rows_phases(const LinearRowsArgs& args);
int64_t linear_rows_tasks(const LinearRowsArgs& args, int64_t phase);
void linear_rows(const LinearRowsArgs& args, int64_t phase, int64_t begin, int64_t end);
}  // namespace cpu

namespace cuda {
bool linear_rows_prepares(const LinearRowsArgs& args);
int linear_rows(const LinearRowsArgs& args, void* stream);
}  // namespace cuda

}  // namespace dk
