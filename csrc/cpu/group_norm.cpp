// Group normalisation, forward: sums and squares of blocks, their merge, then an element after the other.
#include "group_norm.h"

namespace dk::cpu {
namespace {

// Sum and squares of rows, by lanes.
struct RowSums {
  template <class E, class T>
  DK_BODY static void run(const E* rows_of_x, int64_t stride, int64_t rows, int64_t n, T* partial, int64_t channels) {
    for (int64_t r = 0; r < rows; ++r) {
      const E* x = rows_of_x + r * stride;
      const T sum = norm_by_lanes<T>(n, [=](T lane, int64_t i) DK_INLINE { return add(lane, T(widen(x[i]))); });
      const T mean = div(sum, static_cast<T>(n));
      partial[r] = sum;
      partial[channels + r] = norm_by_lanes<T>(n, [=](T lane, int64_t i) DK_INLINE {
        const T d = sub(T(widen(x[i])), mean);
        return fma(d, d, lane);
      });
    }
  }
};

constexpr int64_t kNormColumns = 256;

// The same of columns, position after position.
struct ColumnSums {
  template <class E, class T>
  DK_BODY static void run(const E* x, int64_t stride, int64_t rows, int64_t n, T* partial, int64_t channels) {
    T sums[kNormColumns], means[kNormColumns], squares[kNormColumns];
    for (int64_t j = 0; j < n; ++j) sums[j] = squares[j] = T(0);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
      const E *x0 = x + r * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T two = add(add(sums[j], T(widen(x0[j]))), T(widen(x1[j])));
        sums[j] = add(add(two, T(widen(x2[j]))), T(widen(x3[j])));
      }
    }
    for (; r < rows; ++r) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) sums[j] = add(sums[j], T(widen(x[r * stride + j])));
    }
    for (int64_t j = 0; j < n; ++j) means[j] = div(sums[j], static_cast<T>(rows));
    for (r = 0; r + 2 <= rows; r += 2) {
      const E *x0 = x + r * stride, *x1 = x0 + stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T d0 = sub(T(widen(x0[j])), means[j]), d1 = sub(T(widen(x1[j])), means[j]);
        squares[j] = fma(d1, d1, fma(d0, d0, squares[j]));
      }
    }
    for (; r < rows; ++r) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T d = sub(T(widen(x[r * stride + j])), means[j]);
        squares[j] = fma(d, d, squares[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      partial[j] = sums[j];
      partial[channels + j] = squares[j];
    }
  }
};

// Channels' sums of x + add.
struct AddSums {
  DK_BODY static void run(const NormProblem& p, const double* added, double* sums, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) sums[j] = norm_channel_sum(p, sums[j], added[j]);
  }
};

// Channels' squares about the means of their groups.
struct MergeSquares {
  template <class T>
  DK_BODY static void run(const T* partial, int64_t channels, int64_t blocks, int64_t tile, const NormProblem& p,
                          const double* centers, double* squares) {
    for (int64_t j = 0; j < tile; ++j) squares[j] = 0;
    for (int64_t k = 0; k < blocks; ++k) {
      const T *sums = partial + 2 * k * channels, *own = sums + channels;
      const double n = static_cast<double>(norm_size(p, k)), inverse = div(1.0, n);
#pragma GCC ivdep
      for (int64_t j = 0; j < tile; ++j) {
        squares[j] = add(squares[j], norm_block_squares(n, inverse, static_cast<double>(sums[j]),
                                                        static_cast<double>(own[j]), centers[j]));
      }
    }
  }
};

template <bool active>
struct ApplyRows {
  template <class E, class T>
  DK_BODY static void run(const E* rows_of_x, int64_t x_stride, E* rows_of_y, int64_t y_stride, const T* factors,
                          int64_t channels, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; ++r) {
      const E* x = rows_of_x + r * x_stride;
      E* y = rows_of_y + r * y_stride;
      const T mean = factors[kNormMean * channels + r], scale = factors[kNormScale * channels + r],
              offset = factors[kNormOffset * channels + r];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) narrow(norm_value<active>(T(widen(x[i])), mean, scale, offset), y[i]);
    }
  }
};

template <bool active>
struct ApplyColumns {
  template <class E, class T>
  DK_BODY static void run(const E* x, int64_t x_stride, E* y, int64_t y_stride, const T* factors, int64_t channels,
                          int64_t rows, int64_t n) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels;
    for (int64_t r = 0; r < rows; ++r) {
      const E* from = x + r * x_stride;
      E* to = y + r * y_stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        narrow(norm_value<active>(T(widen(from[j])), mean[j], scale[j], offset[j]), to[j]);
      }
    }
  }
};

template <class T, class S>
void sums(const GroupNormArgs& args, const NormRegion& region) {
  T buffer[std::is_same_v<S, Half> ? kNormPiece : 1];
  const NormProblem& p = args.problem;
  for_blocks<S>(p, region, kNormColumns, [&](const NormPiece& piece) {
    int64_t stride;
    const NormElement<S, T>* x = norm_load<S>(args.x, piece, buffer, stride);
    T* partial = norm_partial<T>(args, piece.b, piece.k, piece.c);
    if (p.channels_last) {
      at_level<ColumnSums>(x, stride, piece.rows, piece.n, partial, p.channels);
    } else {
      at_level<RowSums>(x, stride, piece.rows, piece.n, partial, p.channels);
    }
  });
}

// Mean and rstd of the groups of channels c .. c_end - 1, and what follows for each channel.
template <class T>
void finish(const GroupNormArgs& args, int64_t b, int64_t c_begin, int64_t c_end) {
  const NormProblem& p = args.problem;
  const int64_t width = norm_width(p), blocks = norm_blocks(p);
  double *sums = norm_sums(args, b, 0), *squares = sums + p.channels, *centers = squares + p.channels;
  norm_tiles(c_begin, c_end, [&](int64_t c, int64_t n) {
    norm_read_tile(args.add, b, c, n, 0.0, centers + c);
    at_level<NormMerge>(static_cast<const T*>(norm_partial<T>(args, b, 0, c)), 2 * p.channels, blocks, n, sums + c);
    at_level<AddSums>(p, static_cast<const double*>(centers + c), sums + c, n);
  });
  for (int64_t c = c_begin; c < c_end; c += width) {
    const double mean = div(norm_group_sum(sums + c, width), norm_count(p));
    static_cast<T*>(args.mean)[b * p.groups + c / width] = static_cast<T>(mean);
    for (int64_t j = c; j < c + width; ++j) centers[j] = sub(mean, centers[j]);
  }
  norm_tiles(c_begin, c_end, [&](int64_t c, int64_t n) {
    at_level<MergeSquares>(static_cast<const T*>(norm_partial<T>(args, b, 0, c)), p.channels, blocks, n, p,
                           static_cast<const double*>(centers + c), squares + c);
  });
  for (int64_t c = c_begin; c < c_end; c += width) {
    static_cast<T*>(args.rstd)[b * p.groups + c / width] =
        static_cast<T>(norm_rstd(p, norm_group_sum(squares + c, width)));
  }
  norm_make_factors<T>(args, b, c_begin, c_end);
}

template <bool active, class T, class S>
void apply(const GroupNormArgs& args, const NormRegion& region) {
  constexpr int64_t kBuffer = std::is_same_v<S, Half> ? kNormPiece : 1;
  T x_buffer[kBuffer], y_buffer[kBuffer];
  const NormProblem& p = args.problem;
  for_elements<S>(p, region, [&](const NormPiece& piece) {
    int64_t x_stride, y_stride;
    const NormElement<S, T>* x = norm_load<S>(args.x, piece, x_buffer, x_stride);
    NormElement<S, T>* y = norm_target<S>(args.out, piece, y_buffer, y_stride);
    const T* factors = norm_factors<T>(args, piece.b) + piece.c;
    if (p.channels_last) {
      at_level<ApplyColumns<active>>(x, x_stride, y, y_stride, factors, p.channels, piece.rows, piece.n);
    } else {
      at_level<ApplyRows<active>>(x, x_stride, y, y_stride, factors, p.channels, piece.rows, piece.n);
    }
    norm_store<S>(args.out, piece, y_buffer);
  });
}

template <class T, class S>
void apply(const GroupNormArgs& args, const NormRegion& region) {
  args.problem.silu ? apply<true, T, S>(args, region) : apply<false, T, S>(args, region);
}

template <class T, class S>
void run(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const NormProblem& p = args.problem;
  for (int64_t task = begin; task < end; ++task) {
    if (norm_is_whole(p)) {
      const NormRegion region = norm_whole(p, task);
      sums<T, S>(args, region);
      finish<T>(args, region.b, region.c, region.c_end);
      apply<T, S>(args, region);
    } else if (phase == 0) {
      sums<T, S>(args, norm_part(p, task));
    } else if (phase == 1) {
      const NormRegion region = norm_bundle_of(p, task);
      finish<T>(args, region.b, region.c, region.c_end);
    } else {
      apply<T, S>(args, norm_part(p, task));
    }
  }
}

}  // namespace

int64_t group_norm_phases(const NormProblem& problem) { return norm_is_whole(problem) ? 1 : 3; }

int64_t group_norm_tasks(const NormProblem& p, int64_t phase) {
  return norm_is_whole(p) ? norm_whole_tasks(p) : phase == 1 ? p.batch * norm_bundles(p) : norm_pass_tasks(p);
}

void group_norm(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  norm_for_dtype(args.x.dtype, [&](auto t, auto s) { run<decltype(t), decltype(s)>(args, phase, begin, end); });
}

}  // namespace dk::cpu
