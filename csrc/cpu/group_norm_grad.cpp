// Group normalisation, backward: sums of each channel's blocks, those of its group, then the gradient of x. What lies
// between x and y is made again in both passes.
#include "group_norm.h"

namespace dk::cpu {
namespace {

template <class T>
struct Factors {
  T mean, scale, offset;
};

// P, Q / rstd and, for a partial of three terms, R of one row, by lanes.
template <bool active>
struct RowSums {
  template <class T>
  DK_BODY static void run(const T* g, const T* x, const Factors<T>& factors, int64_t n, T* partial, int terms) {
    const T mean = factors.mean, scale = factors.scale, offset = factors.offset;
    T gu[kNormRun], p[kNormLanes] = {}, q[kNormLanes] = {};
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) gu[i] = norm_gu<active>(g[i], x[i], mean, scale, offset);
    int64_t i = 0;
    for (; i + kNormLanes <= n; i += kNormLanes) {
      for (int j = 0; j < kNormLanes; ++j) {
        p[j] = add(p[j], gu[i + j]);
        q[j] = fma(gu[i + j], sub(x[i + j], mean), q[j]);
      }
    }
    for (int64_t j = 0; i + j < n; ++j) {
      p[j] = add(p[j], gu[i + j]);
      q[j] = fma(gu[i + j], sub(x[i + j], mean), q[j]);
    }
    partial[0] = norm_fold(p);
    partial[1] = norm_fold(q);
    if (terms < 3) return;
    T lanes[kNormLanes] = {};
    for (i = 0; i + kNormLanes <= n; i += kNormLanes) {
      for (int j = 0; j < kNormLanes; ++j) lanes[j] = add(lanes[j], sub(x[i + j], mean));
    }
    for (int64_t j = 0; i + j < n; ++j) lanes[j] = add(lanes[j], sub(x[i + j], mean));
    partial[2] = norm_fold(lanes);
  }
};

// The same of columns, position after position.
template <bool active>
struct ColumnSums {
  template <class T>
  DK_BODY static void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, const T* factors,
                          int64_t channels, int64_t rows, int64_t n, T* partial, int terms) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels;
    T p[kNormTile], q[kNormTile];
    for (int64_t j = 0; j < n; ++j) p[j] = q[j] = T(0);
    for (int64_t r = 0; r < rows; ++r) {
      const T *gr = g + r * g_stride, *xr = x + r * x_stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T gu = norm_gu<active>(gr[j], xr[j], mean[j], scale[j], offset[j]);
        p[j] = add(p[j], gu);
        q[j] = fma(gu, sub(xr[j], mean[j]), q[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      partial[terms * j] = p[j];
      partial[terms * j + 1] = q[j];
    }
    if (terms < 3) return;
    for (int64_t j = 0; j < n; ++j) p[j] = T(0);
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) p[j] = add(p[j], sub(x[r * x_stride + j], mean[j]));
    }
    for (int64_t j = 0; j < n; ++j) partial[terms * j + 2] = p[j];
  }
};

template <bool active>
struct ApplyRow {
  template <class T>
  DK_BODY static void run(const T* g, const T* x, T* dx, const Factors<T>& factors, T slope, T level, int64_t n) {
    const T mean = factors.mean, scale = factors.scale, offset = factors.offset;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T gu = norm_gu<active>(g[i], x[i], mean, scale, offset);
      dx[i] = norm_dx(gu, x[i], mean, scale, slope, level);
    }
  }
};

template <bool active>
struct ApplyColumns {
  template <class T>
  DK_BODY static void run(const T* g, int64_t g_stride, const T* x, int64_t x_stride, T* dx, int64_t dx_stride,
                          const T* factors, int64_t channels, int64_t rows, int64_t n) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels, *slope = factors + kNormSlope * channels,
            *level = factors + kNormLevel * channels;
    for (int64_t r = 0; r < rows; ++r) {
      const T *gr = g + r * g_stride, *xr = x + r * x_stride;
      T* to = dx + r * dx_stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T gu = norm_gu<active>(gr[j], xr[j], mean[j], scale[j], offset[j]);
        to[j] = norm_dx(gu, xr[j], mean[j], scale[j], slope[j], level[j]);
      }
    }
  }
};

template <class T>
Factors<T> factors_at(const T* factors, int64_t channels) {
  return {factors[kNormMean * channels], factors[kNormScale * channels], factors[kNormOffset * channels]};
}

template <bool active, class T>
void sums(const GroupNormArgs& args, const NormRegion& region) {
  T g_buffer[kNormPiece], x_buffer[kNormPiece];
  const NormProblem& p = args.problem;
  for_pieces(p, region, [&](const NormPiece& piece) {
    int64_t g_stride, x_stride;
    const T* g = norm_load(args.grad_out, piece, g_buffer, g_stride);
    const T* x = norm_load(args.x, piece, x_buffer, x_stride);
    const T* factors = norm_factors<T>(args, piece.b) + piece.c;
    T* partial = norm_partial<T>(args, piece.b, piece.k, piece.c);
    if (p.channels_last) {
      at_level<ColumnSums<active>>(g, g_stride, x, x_stride, factors, p.channels, piece.rows, piece.n, partial,
                                   norm_terms(args));
    } else {
      at_level<RowSums<active>>(g, x, factors_at(factors, p.channels), piece.n, partial, norm_terms(args));
    }
  });
}

template <class T>
void finish(const GroupNormArgs& args, int64_t b, int64_t g) {
  const NormProblem& p = args.problem;
  const int64_t width = norm_width(p), first = g * width;
  const T rstd = static_cast<const T*>(args.rstd)[b * p.groups + g];
  for (int64_t c = first; c < first + width; ++c) norm_set_sums<T>(args, b, c, rstd);
  using Sums = NormGroupSums<NormRead>;
  const double whole_p = norm_sum(1, width, Sums{&args, b, first, 0, norm_read});
  const double whole_q = norm_sum(1, width, Sums{&args, b, first, 1, norm_read});
  const NormSlopes slopes = norm_slopes(p, static_cast<double>(rstd), whole_p, whole_q);
  for (int64_t c = first; c < first + width; ++c) {
    norm_set_slopes<T>(args, b, c, slopes);
    const double* of = norm_channel_sums(args, b, c);
    const NormChannel k = norm_channel(args, b, c, norm_read);
    if (args.d_scale.data != nullptr) norm_write(args.d_scale, b, c, norm_d_scale(k, of));
    if (args.d_shift.data != nullptr) norm_write(args.d_shift, b, c, of[0]);
    if (args.d_add.data != nullptr) norm_write(args.d_add, b, c, norm_d_add(p, k, slopes, of));
  }
}

template <bool active, class T>
void apply(const GroupNormArgs& args, const NormRegion& region) {
  T g_buffer[kNormPiece], x_buffer[kNormPiece], dx_buffer[kNormPiece];
  const NormProblem& p = args.problem;
  for_pieces(p, region, [&](const NormPiece& piece) {
    int64_t g_stride, x_stride, dx_stride;
    const T* g = norm_load(args.grad_out, piece, g_buffer, g_stride);
    const T* x = norm_load(args.x, piece, x_buffer, x_stride);
    T* dx = norm_target(args.out, piece, dx_buffer, dx_stride);
    const T* factors = norm_factors<T>(args, piece.b) + piece.c;
    if (p.channels_last) {
      at_level<ApplyColumns<active>>(g, g_stride, x, x_stride, dx, dx_stride, factors, p.channels, piece.rows, piece.n);
    } else {
      at_level<ApplyRow<active>>(g, x, dx, factors_at(factors, p.channels), factors[kNormSlope * p.channels],
                                 factors[kNormLevel * p.channels], piece.n);
    }
    norm_store(args.out, piece, dx, dx_buffer);
  });
}

void parameters(const GroupNormArgs& args, int64_t c) {
  if (args.d_bias.data != nullptr) norm_write(args.d_bias, 0, c, norm_d_parameter(args, c, 0, norm_read));
  if (args.d_weight.data != nullptr) norm_write(args.d_weight, 0, c, norm_d_parameter(args, c, 1, norm_read));
}

template <bool active, class T>
void run(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const NormProblem& p = args.problem;
  const bool whole = norm_is_whole(p);
  for (int64_t task = begin; task < end; ++task) {
    if (phase == group_norm_grad_phases(p) - 1) {
      parameters(args, task);
    } else if (whole) {
      const NormRegion region = norm_whole(p, task);
      const int64_t first = region.c / norm_width(p), last = region.c_end / norm_width(p);
      for (int64_t g = first; g < last; ++g) norm_factors_of_group<T>(args, region.b, g);
      sums<active, T>(args, region);
      for (int64_t g = first; g < last; ++g) finish<T>(args, region.b, g);
      apply<active, T>(args, region);
    } else if (phase == 0) {
      norm_factors_of_group<T>(args, task / p.groups, task % p.groups);
    } else if (phase == 1) {
      sums<active, T>(args, norm_part(p, task));
    } else if (phase == 2) {
      finish<T>(args, task / p.groups, task % p.groups);
    } else {
      apply<active, T>(args, norm_part(p, task));
    }
  }
}

template <class T>
void run(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  args.problem.silu ? run<true, T>(args, phase, begin, end) : run<false, T>(args, phase, begin, end);
}

}  // namespace

int64_t group_norm_grad_phases(const NormProblem& problem) { return norm_is_whole(problem) ? 2 : 5; }

int64_t group_norm_grad_tasks(const NormProblem& p, int64_t phase) {
  if (phase == group_norm_grad_phases(p) - 1) return p.channels;
  if (norm_is_whole(p)) return norm_whole_tasks(p);
  return phase % 2 == 0 ? p.batch * p.groups : norm_pass_tasks(p);
}

void group_norm_grad(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  args.x.dtype == Dtype::f64 ? run<double>(args, phase, begin, end) : run<float>(args, phase, begin, end);
}

}  // namespace dk::cpu
