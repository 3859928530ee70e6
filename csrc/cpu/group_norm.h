// What forward and backward of group normalisation share: tasks, regions of a sample, pieces of them, and what is known
// of each channel (core/group_norm.h has the order of the sums).
#pragma once

#include <algorithm>
#include <type_traits>

#include "../core/group_norm.h"
#include "blocks.h"
#include "levels.h"

namespace dk::cpu {

using dk::narrow;  // of an element, beside those of a stretch
using dk::widen;

// Channels c .. c_end - 1 of blocks k .. k_end - 1.
struct NormRegion {
  int64_t b, c, c_end, k, k_end;
};

constexpr int64_t kNormTile = 64;     // channels that are read, merged and written together
constexpr int64_t kNormWide = 1024;   // channels of a piece of a channels_last sample at most
constexpr int64_t kNormPiece = 4096;  // elements of a piece that passes through a buffer
static_assert(kNormPiece >= kNormRun && kNormPiece >= kNormRows * kNormTile && kNormPiece >= kNormWide);

// Groups that are a task, or whose sums are merged in one: enough of them to be worth it.
inline int64_t norm_bundle(const NormProblem& p) {
  constexpr int64_t kEnough = 16384;
  const int64_t many = p.channels_last ? kNormTile / norm_width(p) : kEnough / (norm_width(p) * p.positions);
  return std::min(p.groups, std::max(int64_t{1}, many));
}
inline int64_t norm_bundles(const NormProblem& p) { return (p.groups + norm_bundle(p) - 1) / norm_bundle(p); }

// Some groups (contiguous) or a sample (channels_last) are a task where there are enough of them, or little to do: the
// second pass then finds x in the cache. Else every pass is a phase of its own, over channels or blocks.
inline bool norm_is_whole(const NormProblem& p) {
  constexpr int64_t kEnough = 16, kLittle = 32768;
  return (p.channels_last ? p.batch : p.batch * p.groups) >= kEnough || p.channels * p.positions <= kLittle;
}

inline int64_t norm_whole_tasks(const NormProblem& p) { return p.channels_last ? p.batch : p.batch * norm_bundles(p); }
inline int64_t norm_pass_tasks(const NormProblem& p) {
  return p.batch * (p.channels_last ? norm_blocks(p) : p.channels);
}

inline NormRegion norm_bundle_of(const NormProblem& p, int64_t task) {
  const int64_t width = norm_width(p), first = task % norm_bundles(p) * norm_bundle(p);
  const int64_t end = std::min(p.groups, first + norm_bundle(p));
  return {task / norm_bundles(p), first * width, end * width, 0, norm_blocks(p)};
}

inline NormRegion norm_whole(const NormProblem& p, int64_t task) {
  return p.channels_last ? NormRegion{task, 0, p.channels, 0, norm_blocks(p)} : norm_bundle_of(p, task);
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
// `rows` rows of n neighbours. In a contiguous sample a row is a block of a channel, and a piece has channels c, c + 1,
// ... as rows; in a channels_last block the positions are rows, and a piece has up to `wide` channels. Long rows are
// read as one stream of memory.
struct NormPiece {
  int64_t b, c, k, rows, n;
  int64_t offset, stride;  // in elements of the sample: of the first row, from row to row
};

template <class Use>
void for_pieces(const NormProblem& p, const NormRegion& region, int64_t wide, int64_t rows_at_once, const Use& use) {
  if (p.channels_last) {
    const int64_t parts = (p.channels + wide - 1) / wide;
    const int64_t many = (p.channels / parts + kNormTile - 1) / kNormTile * kNormTile;
    for (int64_t k = region.k; k < region.k_end; ++k) {
      const int64_t size = norm_size(p, k);
      for (int64_t row = 0; row < size; row += rows_at_once) {
        const int64_t rows = std::min(rows_at_once, size - row), begin = (k * kNormRows + row) * p.channels;
        for (int64_t c = 0; c < p.channels; c += many) {
          use(NormPiece{region.b, c, k, rows, std::min(many, p.channels - c), begin + c, p.channels});
        }
      }
    }
    return;
  }
  const int64_t many = p.positions <= kNormRun ? kNormPiece / p.positions : 1;
  for (int64_t c = region.c; c < region.c_end; c += many) {
    for (int64_t k = region.k; k < region.k_end; ++k) {
      const int64_t rows = std::min(many, region.c_end - c);
      use(NormPiece{region.b, c, k, rows, norm_size(p, k), c * p.positions + k * kNormRun, p.positions});
    }
  }
}

// Pieces whose blocks are summed are whole blocks; an element after the other may be any number of rows. float16 passes
// through a buffer, so that its pieces are no larger.
template <class S, class Use>
void for_blocks(const NormProblem& p, const NormRegion& region, int64_t wide, const Use& use) {
  for_pieces(p, region, std::is_same_v<S, Half> ? kNormTile : wide, kNormRows, use);
}
template <class S, class Use>
void for_elements(const NormProblem& p, const NormRegion& region, const Use& use) {
  const int64_t most = std::min(p.channels, kNormWide);
  for_pieces(p, region, kNormWide, std::is_same_v<S, Half> ? kNormPiece / most : kNormRows, use);
}

// The type that the loops read and write. float16 has no conversion in plain loops: it passes through a buffer.
template <class S, class T>
using NormElement = std::conditional_t<std::is_same_v<S, Half>, T, S>;

template <class S>
S* norm_address(const View& view, const NormPiece& piece, int64_t row = 0) {
  return static_cast<S*>(view.data) + piece.b * view.batch_stride + piece.offset + row * piece.stride;
}

// A piece of an input, where it lies or widened into `buffer`; sets the stride of its rows.
template <class S, class T>
const NormElement<S, T>* norm_load(const View& view, const NormPiece& piece, T* buffer, int64_t& stride) {
  stride = piece.stride;
  if constexpr (!std::is_same_v<S, Half>) {
    return norm_address<S>(view, piece);
  } else {
    stride = piece.n;
    for (int64_t r = 0; r < piece.rows; ++r) {
      widen(view.dtype, norm_address<S>(view, piece, r), buffer + r * piece.n, piece.n);
    }
    return buffer;
  }
}

template <class S, class T>
NormElement<S, T>* norm_target(const View& view, const NormPiece& piece, T* buffer, int64_t& stride) {
  if constexpr (!std::is_same_v<S, Half>) {
    stride = piece.stride;
    return norm_address<S>(view, piece);
  } else {
    stride = piece.n;
    return buffer;
  }
}

template <class S, class T>
void norm_store(const View& view, const NormPiece& piece, const T* buffer) {
  if constexpr (std::is_same_v<S, Half>) {
    for (int64_t r = 0; r < piece.rows; ++r) {
      narrow(buffer + r * piece.n, view.dtype, norm_address<S>(view, piece, r), piece.n);
    }
  }
}

// use(T, S) with values of the type of the arithmetic and of x.
template <class Use>
void norm_for_dtype(Dtype dtype, const Use& use) {
  switch (dtype) {
    case Dtype::f64:
      return use(double{}, double{});
    case Dtype::f32:
      return use(float{}, float{});
    case Dtype::f16:
      return use(float{}, Half{});
    case Dtype::bf16:
      return use(float{}, Bfloat16{});
    case Dtype::u8:
      return;
  }
}

// ------------------------------------------------------------------------------------------------- lanes
template <int count = kNormLanes, class T>
DK_BODY T norm_fold(T* lanes) {
#pragma GCC unroll 5
  for (int half = count / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int j = 0; j < half; ++j) lanes[j] = add(lanes[j], lanes[j + half]);
  }
  return lanes[0];
}

// What lanes make of items 0 .. n - 1, folded: lane = step(lane, item), from 0. A first round of all lanes needs no
// memory to be cleared; maps of 4 x 4 have half of them, and a lane that stays 0 adds nothing.
template <class T, class Step>
DK_BODY T norm_by_lanes(int64_t n, const Step& step) {
  T lanes[kNormLanes];
  int64_t i = 0;
  if (n == kNormLanes / 2) {
    for (int j = 0; j < kNormLanes / 2; ++j) lanes[j] = step(T(0), j);
    return norm_fold<kNormLanes / 2>(lanes);
  }
  if (n >= kNormLanes) {
    for (int j = 0; j < kNormLanes; ++j) lanes[j] = step(T(0), j);
    i = kNormLanes;
  } else {
    for (int j = 0; j < kNormLanes; ++j) lanes[j] = T(0);
  }
  for (; i + kNormLanes <= n; i += kNormLanes) {
    for (int j = 0; j < kNormLanes; ++j) lanes[j] = step(lanes[j], i + j);
  }
  for (int64_t j = 0; i + j < n; ++j) lanes[j] = step(lanes[j], i + j);
  return norm_fold(lanes);
}

// The sum over the channels of a group by lanes. Most groups have few: lanes that stay 0 are left out.
inline double norm_group_sum(const double* terms, int64_t width) {
  double lanes[kNormLanes];
  int64_t used = std::min(width, int64_t{kNormLanes});
  for (int64_t j = 0; j < used; ++j) {
    lanes[j] = add(0.0, terms[j]);
    for (int64_t c = j + kNormLanes; c < width; c += kNormLanes) lanes[j] = add(lanes[j], terms[c]);
  }
  for (int64_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j + half < used; ++j) lanes[j] = add(lanes[j], lanes[j + half]);
    used = std::min(used, half);
  }
  return lanes[0];
}

// --------------------------------------------------------------------------------------------- parameters
double norm_read(const ChannelView& view, int64_t b, int64_t c);
void norm_write(const ChannelView& view, int64_t b, int64_t c, double value);

// The numbers of channels c .. c + n - 1, n <= kNormTile.
struct NormTile {
  double weight[kNormTile], bias[kNormTile], gain[kNormTile], shift[kNormTile], added[kNormTile];
  void read(const GroupNormArgs& args, int64_t b, int64_t c, int64_t n);
  NormChannel at(int64_t j) const { return {weight[j], bias[j], gain[j], shift[j], added[j]}; }
};
void norm_read_tile(const ChannelView& view, int64_t b, int64_t c, int64_t n, double absent, double* out);
void norm_write_tile(const ChannelView& view, int64_t b, int64_t c, int64_t n, const double* values);

// use(c, n) for tiles of channels c .. c + n - 1.
template <class Use>
void norm_tiles(int64_t c, int64_t c_end, const Use& use) {
  for (; c < c_end; c += kNormTile) use(c, std::min(kNormTile, c_end - c));
}

// Sums of channels, from their blocks one after the other; `step` from block to block.
struct NormMerge {
  template <class T>
  DK_BODY static void run(const T* partial, int64_t step, int64_t blocks, int64_t n, double* sums) {
    for (int64_t j = 0; j < n; ++j) sums[j] = 0;
    for (int64_t k = 0; k < blocks; ++k) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) sums[j] = add(sums[j], static_cast<double>(partial[k * step + j]));
    }
  }
};

struct NormFactorLoop {
  template <class T>
  DK_BODY static void run(const T* mean, const T* rstd, const NormTile& of, T* factors, int64_t channels, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      norm_set_affine(factors + j, channels, norm_affine_of(mean[j], rstd[j], of.at(j)));
    }
  }
};

// The factors of u of channels c .. c_end - 1, from the mean and rstd of their groups.
template <class T>
void norm_make_factors(const GroupNormArgs& args, int64_t b, int64_t c_begin, int64_t c_end) {
  const NormProblem& p = args.problem;
  const int64_t width = norm_width(p);
  norm_tiles(c_begin, c_end, [&](int64_t c, int64_t n) {
    NormTile of;
    of.read(args, b, c, n);
    T mean[kNormTile], rstd[kNormTile];
    for (int64_t j = 0, g = c / width, left = width - c % width; j < n; ++j) {
      mean[j] = static_cast<const T*>(args.mean)[b * p.groups + g];
      rstd[j] = static_cast<const T*>(args.rstd)[b * p.groups + g];
      if (--left == 0) left = width, ++g;
    }
    at_level<NormFactorLoop>(static_cast<const T*>(mean), static_cast<const T*>(rstd), of, norm_factors<T>(args, b) + c,
                             p.channels, n);
  });
}

}  // namespace dk::cpu
