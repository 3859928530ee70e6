// Group normalisation, forward: sums and squares of blocks, their merge, then an element after the other.
#include "group_norm.h"

namespace dk::cpu {
namespace {

// Sum and squares of one row, by lanes.
struct RowSums {
  template <class T>
  DK_BODY static void run(const T* x, int64_t n, T* partial) {
    T lanes[kNormLanes] = {};
    int64_t i = 0;
    for (; i + kNormLanes <= n; i += kNormLanes) {
      for (int j = 0; j < kNormLanes; ++j) lanes[j] = add(lanes[j], x[i + j]);
    }
    for (int64_t j = 0; i + j < n; ++j) lanes[j] = add(lanes[j], x[i + j]);
    const T sum = norm_fold(lanes), mean = div(sum, static_cast<T>(n));
    T squares[kNormLanes] = {};
    for (i = 0; i + kNormLanes <= n; i += kNormLanes) {
      for (int j = 0; j < kNormLanes; ++j) {
        const T d = sub(x[i + j], mean);
        squares[j] = fma(d, d, squares[j]);
      }
    }
    for (int64_t j = 0; i + j < n; ++j) {
      const T d = sub(x[i + j], mean);
      squares[j] = fma(d, d, squares[j]);
    }
    partial[0] = sum;
    partial[1] = norm_fold(squares);
  }
};

// The same of columns, position after position.
struct ColumnSums {
  template <class T>
  DK_BODY static void run(const T* x, int64_t stride, int64_t rows, int64_t n, T* partial) {
    T sums[kNormTile], means[kNormTile], squares[kNormTile];
    for (int64_t j = 0; j < n; ++j) sums[j] = squares[j] = T(0);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const T *x0 = x + r * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) sums[j] = add(add(add(add(sums[j], x0[j]), x1[j]), x2[j]), x3[j]);
    }
    for (; r < rows; ++r) {
      for (int64_t j = 0; j < n; ++j) sums[j] = add(sums[j], x[r * stride + j]);
    }
    for (int64_t j = 0; j < n; ++j) means[j] = div(sums[j], static_cast<T>(rows));
    for (r = 0; r + 2 <= rows; r += 2) {
      const T *x0 = x + r * stride, *x1 = x0 + stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T d0 = sub(x0[j], means[j]), d1 = sub(x1[j], means[j]);
        squares[j] = fma(d1, d1, fma(d0, d0, squares[j]));
      }
    }
    for (; r < rows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        const T d = sub(x[r * stride + j], means[j]);
        squares[j] = fma(d, d, squares[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      partial[2 * j] = sums[j];
      partial[2 * j + 1] = squares[j];
    }
  }
};

template <bool active>
struct ApplyRow {
  template <class T>
  DK_BODY static void run(const T* x, T* y, T mean, T scale, T offset, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = norm_value<active>(x[i], mean, scale, offset);
  }
};

template <bool active>
struct ApplyColumns {
  template <class T>
  DK_BODY static void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, const T* factors, int64_t channels,
                          int64_t rows, int64_t n) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels;
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = x + r * x_stride;
      T* to = y + r * y_stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) to[j] = norm_value<active>(from[j], mean[j], scale[j], offset[j]);
    }
  }
};

template <class T>
void sums(const GroupNormArgs& args, const NormRegion& region) {
  T buffer[kNormPiece];
  const NormProblem& p = args.problem;
  for_pieces(p, region, [&](const NormPiece& piece) {
    int64_t stride;
    const T* x = norm_load(args.x, piece, buffer, stride);
    T* partial = norm_partial<T>(args, piece.b, piece.k, piece.c);
    if (p.channels_last) {
      at_level<ColumnSums>(x, stride, piece.rows, piece.n, partial);
    } else {
      at_level<RowSums>(x, piece.n, partial);
    }
  });
}

template <class T>
void finish(const GroupNormArgs& args, int64_t b, int64_t g) {
  const NormProblem& p = args.problem;
  const int64_t width = norm_width(p), blocks = norm_blocks(p), first = g * width, at = b * p.groups + g;
  const double count = norm_count(p);
  const double mean = div(norm_sum(blocks, width, NormSums<T, NormRead>{&args, b, first, norm_read}), count);
  const double squares = norm_sum(blocks, width, NormSquares<T, NormRead>{&args, b, first, norm_read, mean});
  static_cast<T*>(args.mean)[at] = static_cast<T>(mean);
  static_cast<T*>(args.rstd)[at] = static_cast<T>(norm_rstd(squares, count, p.eps));
  norm_factors_of_group<T>(args, b, g);
}

template <bool active, class T>
void apply(const GroupNormArgs& args, const NormRegion& region) {
  T x_buffer[kNormPiece], y_buffer[kNormPiece];
  const NormProblem& p = args.problem;
  for_pieces(p, region, [&](const NormPiece& piece) {
    int64_t x_stride, y_stride;
    const T* x = norm_load(args.x, piece, x_buffer, x_stride);
    T* y = norm_target(args.out, piece, y_buffer, y_stride);
    const T* factors = norm_factors<T>(args, piece.b) + piece.c;
    if (p.channels_last) {
      at_level<ApplyColumns<active>>(x, x_stride, y, y_stride, factors, p.channels, piece.rows, piece.n);
    } else {
      at_level<ApplyRow<active>>(x, y, factors[kNormMean * p.channels], factors[kNormScale * p.channels],
                                 factors[kNormOffset * p.channels], piece.n);
    }
    norm_store(args.out, piece, y, y_buffer);
  });
}

template <class T>
void apply(const GroupNormArgs& args, const NormRegion& region) {
  args.problem.silu ? apply<true, T>(args, region) : apply<false, T>(args, region);
}

template <class T>
void run(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const NormProblem& p = args.problem;
  for (int64_t task = begin; task < end; ++task) {
    if (norm_is_whole(p)) {
      const NormRegion region = norm_whole(p, task);
      sums<T>(args, region);
      for (int64_t g = region.c / norm_width(p); g < region.c_end / norm_width(p); ++g) finish<T>(args, region.b, g);
      apply<T>(args, region);
    } else if (phase == 0) {
      sums<T>(args, norm_part(p, task));
    } else if (phase == 1) {
      finish<T>(args, task / p.groups, task % p.groups);
    } else {
      apply<T>(args, norm_part(p, task));
    }
  }
}

}  // namespace

int64_t group_norm_phases(const NormProblem& problem) { return norm_is_whole(problem) ? 1 : 3; }

int64_t group_norm_tasks(const NormProblem& p, int64_t phase) {
  return norm_is_whole(p) ? norm_whole_tasks(p) : phase == 1 ? p.batch * p.groups : norm_pass_tasks(p);
}

void group_norm(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? run<double>(args, phase, begin, end) : run<float>(args, phase, begin, end);
}

}  // namespace dk::cpu
