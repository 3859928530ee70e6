// What forward and backward of group normalisation share: regions of a sample, pieces of them as contiguous arrays of
// T, and sums by lanes (core/group_norm.h has the order).
#pragma once

#include <algorithm>

#include "../core/group_norm.h"
#include "blocks.h"
#include "levels.h"

namespace dk::cpu {

// Channels c .. c_end - 1 of blocks k .. k_end - 1.
struct NormRegion {
  int64_t b, c, c_end, k, k_end;
};

constexpr int64_t kNormTile = 64;  // channels of a piece of a channels_last sample

// A task is a whole group (contiguous) or sample (channels_last) where there are enough of them, or little to do: its
// second pass then finds x in the cache. Else every pass is a phase of its own, over channels or blocks.
inline bool norm_is_whole(const NormProblem& p) {
  constexpr int64_t kEnough = 16, kLittle = 32768;
  return (p.channels_last ? p.batch : p.batch * p.groups) >= kEnough || p.channels * p.positions <= kLittle;
}

inline int64_t norm_whole_tasks(const NormProblem& p) { return p.channels_last ? p.batch : p.batch * p.groups; }
inline int64_t norm_pass_tasks(const NormProblem& p) {
  return p.batch * (p.channels_last ? norm_blocks(p) : p.channels);
}

inline NormRegion norm_whole(const NormProblem& p, int64_t task) {
  if (p.channels_last) return {task, 0, p.channels, 0, norm_blocks(p)};
  const int64_t width = norm_width(p), g = task % p.groups;
  return {task / p.groups, g * width, (g + 1) * width, 0, norm_blocks(p)};
}

inline NormRegion norm_part(const NormProblem& p, int64_t task) {
  if (p.channels_last) {
    const int64_t blocks = norm_blocks(p), k = task % blocks;
    return {task / blocks, 0, p.channels, k, k + 1};
  }
  const int64_t c = task % p.channels;
  return {task / p.channels, c, c + 1, 0, norm_blocks(p)};
}

// ------------------------------------------------------------------------------------------------- pieces
// `rows` rows of n neighbours: a block of a contiguous channel is one row; a piece of a channels_last block has its
// positions as rows, and up to kNormTile channels.
struct NormPiece {
  int64_t b, c, k, rows, n;
  int64_t offset, stride;  // in elements of the sample: of the first row, from row to row
};

template <class Use>
void for_pieces(const NormProblem& p, const NormRegion& region, const Use& use) {
  for (int64_t k = region.k; k < region.k_end; ++k) {
    const int64_t size = norm_size(p, k), begin = k * norm_block(p);
    if (p.channels_last) {
      for (int64_t c = region.c; c < region.c_end; c += kNormTile) {
        use(NormPiece{region.b, c, k, size, std::min(kNormTile, region.c_end - c), begin * p.channels + c, p.channels});
      }
    } else {
      for (int64_t c = region.c; c < region.c_end; ++c) {
        use(NormPiece{region.b, c, k, 1, size, c * p.positions + begin, size});
      }
    }
  }
}

constexpr int64_t kNormPiece = std::max(kNormRun, kNormRows* kNormTile);

inline char* norm_address(const View& view, const NormPiece& piece, int64_t row = 0) {
  return address(view, piece.b * view.batch_stride + piece.offset + row * piece.stride);
}

// A piece of an input, where it lies or widened into `buffer`; sets the stride of its rows.
template <class T>
const T* norm_load(const View& view, const NormPiece& piece, T* buffer, int64_t& stride) {
  stride = view.dtype == kDtypeOf<T> ? piece.stride : piece.n;
  if (view.dtype == kDtypeOf<T>) return reinterpret_cast<const T*>(norm_address(view, piece));
  for (int64_t r = 0; r < piece.rows; ++r) {
    widen(view.dtype, norm_address(view, piece, r), buffer + r * piece.n, piece.n);
  }
  return buffer;
}

template <class T>
T* norm_target(const View& view, const NormPiece& piece, T* buffer, int64_t& stride) {
  stride = view.dtype == kDtypeOf<T> ? piece.stride : piece.n;
  return view.dtype == kDtypeOf<T> ? reinterpret_cast<T*>(norm_address(view, piece)) : buffer;
}

template <class T>
void norm_store(const View& view, const NormPiece& piece, const T* from, const T* buffer) {
  if (from != buffer) return;
  for (int64_t r = 0; r < piece.rows; ++r) {
    narrow(buffer + r * piece.n, view.dtype, norm_address(view, piece, r), piece.n);
  }
}

// ------------------------------------------------------------------------------------------------- lanes
template <class T>
DK_BODY T norm_fold(T* lanes) {
#pragma GCC unroll 5
  for (int half = kNormLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) lanes[j] = add(lanes[j], lanes[j + half]);
  }
  return lanes[0];
}

// The sum of terms.at(block, channel) over the items of a group.
template <class Terms>
double norm_sum(int64_t blocks, int64_t width, const Terms& terms) {
  double lanes[kNormLanes] = {};
  int lane = 0;
  for (int64_t k = 0; k < blocks; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      lanes[lane] = add(lanes[lane], terms.at(k, c));
      lane = (lane + 1) % kNormLanes;
    }
  }
  return norm_fold(lanes);
}

// --------------------------------------------------------------------------------------------- parameters
inline double norm_read(const ChannelView& view, int64_t b, int64_t c) {
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

using NormRead = double (*)(const ChannelView&, int64_t, int64_t);

inline void norm_write(const ChannelView& view, int64_t b, int64_t c, double value) {
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

// The factors of the channels of group g.
template <class T>
void norm_factors_of_group(const GroupNormArgs& args, int64_t b, int64_t g) {
  const int64_t width = norm_width(args.problem), at = b * args.problem.groups + g;
  for (int64_t c = g * width; c < (g + 1) * width; ++c) {
    norm_set_factors<T>(args, b, c, static_cast<const T*>(args.mean)[at], static_cast<const T*>(args.rstd)[at],
                        norm_channel(args, b, c, norm_read));
  }
}

}  // namespace dk::cpu
