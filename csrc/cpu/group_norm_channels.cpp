// The parameters of channels and their gradients, read and written as float64.
#include "group_norm.h"

namespace dk::cpu {
namespace {

// Neighbours in a dtype that is no float16.
struct WidenLoop {
  template <class S>
  DK_BODY static void run(const S* from, double* to, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) to[j] = static_cast<double>(dk::widen(from[j]));
  }
};

struct NarrowLoop {
  template <class S>
  DK_BODY static void run(const double* from, S* to, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) dk::narrow(from[j], to[j]);
  }
};

}  // namespace

double norm_read(const ChannelView& view, int64_t b, int64_t c) {
  const int64_t at = b * view.batch_stride + c * view.stride;
  switch (view.dtype) {
#define DK_READ(NAME, TYPE, TORCH) \
  case Dtype::NAME:                \
    return dk::widen(static_cast<const TYPE*>(view.data)[at]);
    DK_STORED_DTYPES(DK_READ)
#undef DK_READ
    case Dtype::u8:
      break;
  }
  return 0;
}

void norm_write(const ChannelView& view, int64_t b, int64_t c, double value) {
  const int64_t at = b * view.batch_stride + c * view.stride;
  switch (view.dtype) {
#define DK_WRITE(NAME, TYPE, TORCH)                       \
  case Dtype::NAME:                                       \
    dk::narrow(value, static_cast<TYPE*>(view.data)[at]); \
    break;
    DK_STORED_DTYPES(DK_WRITE)
#undef DK_WRITE
    case Dtype::u8:
      break;
  }
}

void norm_read_tile(const ChannelView& view, int64_t b, int64_t c, int64_t n, double absent, double* out) {
  const int64_t at = b * view.batch_stride + c;
  if (view.data == nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = absent;
  } else if (view.stride == 1 && view.dtype == Dtype::f32) {
    at_level<WidenLoop>(static_cast<const float*>(view.data) + at, out, n);
  } else if (view.stride == 1 && view.dtype == Dtype::bf16) {
    at_level<WidenLoop>(static_cast<const Bfloat16*>(view.data) + at, out, n);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = norm_read(view, b, c + j);
  }
}

void norm_write_tile(const ChannelView& view, int64_t b, int64_t c, int64_t n, const double* values) {
  const int64_t at = b * view.batch_stride + c;
  if (view.stride == 1 && view.dtype == Dtype::f32) {
    at_level<NarrowLoop>(values, static_cast<float*>(view.data) + at, n);
  } else if (view.stride == 1 && view.dtype == Dtype::bf16) {
    at_level<NarrowLoop>(values, static_cast<Bfloat16*>(view.data) + at, n);
  } else {
    for (int64_t j = 0; j < n; ++j) norm_write(view, b, c + j, values[j]);
  }
}

void NormTile::read(const GroupNormArgs& args, int64_t b, int64_t c, int64_t n) {
  norm_read_tile(args.weight, b, c, n, 1.0, weight);
  norm_read_tile(args.bias, b, c, n, 0.0, bias);
  norm_read_tile(args.scale, b, c, n, 0.0, gain);
  norm_read_tile(args.shift, b, c, n, 0.0, shift);
  norm_read_tile(args.add, b, c, n, 0.0, added);
  for (int64_t j = 0; j < n; ++j) gain[j] = add(1.0, gain[j]);
}

}  // namespace dk::cpu
