// Checks that the ops around a sampler step share: the halves of a learned prediction, masks, the next model input,
// rows.
#pragma once

#include <cmath>
#include <vector>

#include "../core/learned_step.h"
#include "operand.h"

namespace dk::bind {

// The two halves of the channels of [B, 2C, ...], or the whole and nothing.
struct Halves {
  std::vector<int64_t> sizes;
  Operand first, second;
  Halves(const char* op, const Operand& whole, int64_t channels, bool halved) : first(whole) {
    if (!whole || !halved) return;
    sizes.assign(whole.sizes, whole.sizes + whole.dims);
    sizes[1] = channels;
    first.sizes = sizes.data();
    second = first;
    second.byte_offset += channels * whole.strides[1] * size_of(float_dtype(op, whole));
  }
  Halves(const Halves&) = delete;
};

// A mask as the kernels read it: of the state's shape, or [B, 1, ...] for all channels of [B, C, ...]. It is the one
// operand that broadcasts, and its channels the one dimension. Absent, it is a u8.
struct Mask {
  std::vector<int64_t> strides;
  Operand whole;
  Dtype dtype = Dtype::u8;
  Mask(const char* op, const Operand& mask, const Operand& out, Dtype state) : whole(mask) {
    if (!mask) return;
    check_same_device(op, mask, out);
    bool shared = mask.dims == out.dims && out.dims > 1 && mask.sizes[1] == 1;
    for (int64_t d = 0; shared && d < out.dims; ++d) shared = d == 1 || mask.sizes[d] == out.sizes[d];
    if (shared) {
      strides.assign(mask.strides, mask.strides + mask.dims);
      if (out.sizes[1] != 1) strides[1] = 0;
      whole.sizes = out.sizes;
      whole.strides = strides.data();
    }
    check_shape(op, whole, out);
    if (is_mask_dtype(mask.dtype)) return;
    if (mask.dtype != out.dtype) {
      fail(op, "mask must be bool, uint8 or the dtype of the state (", dtype_text(out.dtype), "), got ",
           dtype_text(mask.dtype));
    }
    dtype = state;
  }
  Mask(const Mask&) = delete;
};

// The next model input: [B, ...] or [2B, ...], in any dtype.
struct NextInput {
  bool doubled = false;
  Dtype dtype;
  NextInput(const char* op, const Operand& next, const Operand& out, Dtype otherwise) : dtype(otherwise) {
    if (!next) return;
    const int64_t batch = out.sizes[0];
    check_same_device(op, next, out);
    doubled = next.dims > 0 && next.sizes[0] == 2 * batch && batch > 0;
    check_shape(op, next, out, doubled ? 2 : 1);
    dtype = float_dtype(op, next);
  }
};

// The second half of a doubled batch.
inline View second_half(const View& view, int64_t batch) {
  View second = view;
  second.data = static_cast<char*>(view.data) + batch * view.batch_stride * size_of(view.dtype);
  return second;
}

inline void need(const char* op, const Operand& operand, bool reads, const char* why, double coefficient) {
  if (reads && !operand) fail(op, operand.name, " must be given: the row has ", why, " = ", coefficient);
}

inline void check_row_stream(const char* op, const char* column, double stream, int64_t number) {
  if (!(stream >= 0 && stream < 9007199254740992.0 && stream == std::floor(stream))) {
    fail(op, column, " must be an integer in [0, 2^53), got ", stream, " in row ", number);
  }
}

inline void check_clip(const char* op, double clip, int64_t number) {
  if (!(clip > 0)) fail(op, "clip must be positive (inf: no clipping), got ", clip, " in row ", number);
}

// Rows and predictions with a learned variance: what learned_step can run; m is [B, 2C, ...] where the state is
// [B, C, ...].
inline void check_learned_row(const char* op, const double* row, int64_t number) {
  const int excess = learned_step_excess(row);
  if (excess != kLearnedColumns) {
    fail(op, "w, r, e0 .. e3, A, B and D must be 0 in a row with learned variance, got ", row[excess], " in row ",
         number, ", column ", excess);
  }
  for (const int k : {kLogVariance0, kLogVariance1}) {
    if (std::isinf(row[k])) {
      fail(op, k == kLogVariance0 ? "r0" : "r1", " must be finite, got ", row[k], " in row ", number);
    }
  }
}

inline void check_learned_prediction(const char* op, const Operand& m, const Operand& state) {
  if (!m) return;
  bool fits = m.dims == state.dims && state.dims > 1;
  for (int64_t d = 0; fits && d < state.dims; ++d) fits = m.sizes[d] == (d == 1 ? 2 : 1) * state.sizes[d];
  if (!fits) {
    fail(op, "m must hold the prediction and its log-variance, twice the channels of ", state.name, " ",
         shape_text(state), ", got ", shape_text(m));
  }
}

// One source of the state's own noise; with a mask the seeds may be those of the known image's.
inline void check_one_noise(const char* op, const Operand& seeds, const Operand& noise, const Operand& mask) {
  if (seeds && noise && !mask) fail(op, "give either seeds (noise by address) or noise (a tensor), got both");
}

// The noise that a row reads: a source for each, on a stream that exists.
inline void check_row_noise(const char* op, const Operand& seeds, const Operand& noise, uint32_t terms,
                            const double* row, int64_t number) {
  if ((terms & kReadsNoise) && !noise && !seeds) {
    fail(op, "seeds (noise by address) or noise (a tensor) must be given: the row has ", (terms & kTermG) ? "g" : "r",
         " = ", row[(terms & kTermG) ? kG : kR]);
  }
  if ((terms & kTermKnownN) && !seeds) {
    fail(op, "seeds must be given: the row re-noises the known image with known_n = ", row[kKnownN]);
  }
  if (terms & kReadsNoise) check_row_stream(op, "stream", row[kStream], number);
  if (terms & kTermKnownN) check_row_stream(op, "known_stream", row[kKnownStream], number);
}

}  // namespace dk::bind
