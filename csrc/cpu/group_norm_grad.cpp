// Group normalisation, backward: sums of each channel's blocks, those of its group, then the gradient of x. What lies
// between x and y is made again; gu = gy y'(u) is kept from the first pass to the second where it stays in the cache.
#include "group_norm.h"

namespace dk::cpu {
namespace {

// P, Q / rstd and, for a partial of three terms, R of rows, by lanes. `kept`: where gu stays, or nullptr.
template <bool active>
struct RowSums {
  template <class E, class T>
  DK_BODY static void run(const E* rows_of_g, int64_t g_stride, const E* rows_of_x, int64_t x_stride, T* kept,
                          int64_t kept_stride, const T* factors, int64_t channels, int64_t rows, int64_t n, T* partial,
                          int terms) {
    T local[kNormRun];
    for (int64_t row = 0; row < rows; ++row) {
      const E *g = rows_of_g + row * g_stride, *x = rows_of_x + row * x_stride;
      const T mean = factors[kNormMean * channels + row], scale = factors[kNormScale * channels + row],
              offset = factors[kNormOffset * channels + row];
      T* gu = kept != nullptr ? kept + row * kept_stride : local;
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) gu[i] = norm_gu<active>(T(widen(g[i])), T(widen(x[i])), mean, scale, offset);
      partial[row] = norm_by_lanes<T>(n, [=](T lane, int64_t i) DK_INLINE { return add(lane, gu[i]); });
      partial[channels + row] =
          norm_by_lanes<T>(n, [=](T lane, int64_t i) DK_INLINE { return fma(gu[i], sub(T(widen(x[i])), mean), lane); });
      if (terms < 3) continue;
      partial[2 * channels + row] =
          norm_by_lanes<T>(n, [=](T lane, int64_t i) DK_INLINE { return add(lane, sub(T(widen(x[i])), mean)); });
    }
  }
};

// The same of columns, position after position.
template <bool active, bool keep>
struct ColumnSums {
  template <class E, class T>
  DK_BODY static void run(const E* g, int64_t g_stride, const E* x, int64_t x_stride, T* kept, int64_t kept_stride,
                          const T* factors, int64_t channels, int64_t rows, int64_t n, T* partial, int terms) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels;
    T p[kNormWide], q[kNormWide];
    for (int64_t j = 0; j < n; ++j) p[j] = q[j] = T(0);
    for (int64_t r = 0; r < rows; ++r) {
      const E *gr = g + r * g_stride, *xr = x + r * x_stride;
      T* to = keep ? kept + r * kept_stride : nullptr;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T v = T(widen(xr[j])), gu = norm_gu<active>(T(widen(gr[j])), v, mean[j], scale[j], offset[j]);
        if constexpr (keep) to[j] = gu;
        p[j] = add(p[j], gu);
        q[j] = fma(gu, sub(v, mean[j]), q[j]);
      }
    }
    for (int64_t j = 0; j < n; ++j) {
      partial[j] = p[j];
      partial[channels + j] = q[j];
    }
    if (terms < 3) return;
    for (int64_t j = 0; j < n; ++j) p[j] = T(0);
    for (int64_t r = 0; r < rows; ++r) {
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) p[j] = add(p[j], sub(T(widen(x[r * x_stride + j])), mean[j]));
    }
    for (int64_t j = 0; j < n; ++j) partial[2 * channels + j] = p[j];
  }
};

// From gy (make), or from gu itself.
template <bool make>
struct ApplyRows {
  template <class G, class E, class T>
  DK_BODY static void run(const G* rows_of_g, int64_t g_stride, const E* rows_of_x, int64_t x_stride, E* rows_of_dx,
                          int64_t dx_stride, const T* factors, int64_t channels, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; ++r) {
      const G* g = rows_of_g + r * g_stride;
      const E* x = rows_of_x + r * x_stride;
      E* dx = rows_of_dx + r * dx_stride;
      const T *of = factors + r, mean = of[kNormMean * channels], scale = of[kNormScale * channels],
              offset = of[kNormOffset * channels], slope = of[kNormSlope * channels], level = of[kNormLevel * channels];
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const T v = T(widen(x[i])), gu = norm_gu<make>(T(widen(g[i])), v, mean, scale, offset);
        narrow(norm_dx(gu, v, mean, scale, slope, level), dx[i]);
      }
    }
  }
};

template <bool make>
struct ApplyColumns {
  template <class G, class E, class T>
  DK_BODY static void run(const G* rows_of_g, int64_t g_stride, const E* rows_of_x, int64_t x_stride, E* rows_of_dx,
                          int64_t dx_stride, const T* factors, int64_t channels, int64_t rows, int64_t n) {
    const T *mean = factors + kNormMean * channels, *scale = factors + kNormScale * channels,
            *offset = factors + kNormOffset * channels, *slope = factors + kNormSlope * channels,
            *level = factors + kNormLevel * channels;
    for (int64_t r = 0; r < rows; ++r) {
      const G* g = rows_of_g + r * g_stride;
      const E* x = rows_of_x + r * x_stride;
      E* dx = rows_of_dx + r * dx_stride;
#pragma GCC ivdep
      for (int64_t j = 0; j < n; ++j) {
        const T v = T(widen(x[j])), gu = norm_gu<make>(T(widen(g[j])), v, mean[j], scale[j], offset[j]);
        narrow(norm_dx(gu, v, mean[j], scale[j], slope[j], level[j]), dx[j]);
      }
    }
  }
};

// Where gu is kept: `at` holds the element `begin` of a sample. nullptr: it is made twice.
template <class T>
struct Kept {
  T* at;
  int64_t begin;
  T* of(const NormPiece& piece) const { return at == nullptr ? nullptr : at + (piece.offset - begin); }
};

// A sample's gu lies in its gradient of x, of the same dtype, if it stays in the cache there.
template <class T>
Kept<T> kept_in_place(const GroupNormArgs& args, int64_t b) {
  constexpr int64_t kCached = int64_t{1} << 20;
  const NormProblem& p = args.problem;
  if (!p.silu || p.channels * p.positions > kCached) return {nullptr, 0};
  return {static_cast<T*>(args.out.data) + b * args.out.batch_stride, 0};
}

template <bool active, class T, class S>
void sums(const GroupNormArgs& args, const NormRegion& region, const Kept<T>& kept) {
  constexpr int64_t kBuffer = std::is_same_v<S, Half> ? kNormPiece : 1;
  T g_buffer[kBuffer], x_buffer[kBuffer];
  const NormProblem& p = args.problem;
  const int terms = norm_terms(args);
  for_blocks<S>(p, region, kNormWide, [&](const NormPiece& piece) {
    int64_t g_stride, x_stride;
    const NormElement<S, T>* g = norm_load<S>(args.grad_out, piece, g_buffer, g_stride);
    const NormElement<S, T>* x = norm_load<S>(args.x, piece, x_buffer, x_stride);
    const T* factors = norm_factors<T>(args, piece.b) + piece.c;
    T *partial = norm_partial<T>(args, piece.b, piece.k, piece.c), *gu = kept.of(piece);
    const auto run = [&](auto body) {
      at_level<decltype(body)>(g, g_stride, x, x_stride, gu, piece.stride, factors, p.channels, piece.rows, piece.n,
                               partial, terms);
    };
    if (!p.channels_last) return run(RowSums<active>{});
    gu != nullptr ? run(ColumnSums<active, true>{}) : run(ColumnSums<active, false>{});
  });
}

struct ScaleLoop {
  DK_BODY static void run(const NormTile& of, double* sums, int64_t channels, const double* rstd, int64_t n) {
    double *p = sums, *q = sums + channels, *ap = sums + 3 * channels, *aq = sums + 4 * channels;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      const double gain = norm_gain(of.at(j));
      q[j] = mul(q[j], rstd[j]);
      ap[j] = mul(gain, p[j]);
      aq[j] = mul(gain, q[j]);
    }
  }
};

struct ScaleGradient {
  DK_BODY static void run(const NormTile& of, const double* p, const double* q, double* made, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) made[j] = norm_d_scale(of.at(j), p[j], q[j]);
  }
};

struct AddGradient {
  DK_BODY static void run(const NormProblem& problem, const NormTile& of, const double* sums, const double* rstd,
                          double* made, int64_t n) {
    const int64_t channels = problem.channels;
    const double *p = sums, *r = sums + 2 * channels, *slope = sums + 3 * channels, *level = sums + 4 * channels;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
      made[j] = norm_d_add(problem, of.at(j), NormSlopes{rstd[j], slope[j], level[j]}, p[j], r[j]);
    }
  }
};

// Sums of channels c .. c_end - 1 and of their groups, the slopes, and the gradients of a sample's parameters.
template <class T>
void finish(const GroupNormArgs& args, int64_t b, int64_t c_begin, int64_t c_end) {
  const NormProblem& p = args.problem;
  const int64_t width = norm_width(p), channels = p.channels;
  const int terms = norm_terms(args);
  double *sums = norm_sums(args, b, 0), *group_p = sums + 3 * channels, *group_q = sums + 4 * channels;
  const auto rstd_of = [&](int64_t c) {
    return static_cast<double>(static_cast<const T*>(args.rstd)[b * p.groups + c / width]);
  };
  norm_tiles(c_begin, c_end, [&](int64_t c, int64_t n) {
    for (int term = 0; term < terms; ++term) {
      const T* partial = norm_partial<T>(args, b, 0, c) + term * channels;
      at_level<NormMerge>(partial, terms * channels, norm_blocks(p), n, sums + term * channels + c);
    }
    NormTile of;
    of.read(args, b, c, n);
    double rstd[kNormTile];
    for (int64_t j = 0; j < n; ++j) rstd[j] = rstd_of(c + j);
    at_level<ScaleLoop>(of, sums + c, channels, static_cast<const double*>(rstd), n);
  });
  for (int64_t c = c_begin; c < c_end; c += width) {
    const NormSlopes slopes =
        norm_slopes(p, rstd_of(c), norm_group_sum(group_p + c, width), norm_group_sum(group_q + c, width));
    for (int64_t j = c; j < c + width; ++j) {
      norm_set_slopes(norm_factors<T>(args, b) + j, channels, slopes);
      group_p[j] = slopes.slope;
      group_q[j] = slopes.level;
    }
  }
  if (args.d_shift.data == nullptr && args.d_scale.data == nullptr && args.d_add.data == nullptr) return;
  norm_tiles(c_begin, c_end, [&](int64_t c, int64_t n) {
    NormTile of;
    of.read(args, b, c, n);
    const double *p_of = sums + c, *q_of = p_of + channels;
    double made[kNormTile], rstd[kNormTile];
    for (int64_t j = 0; j < n; ++j) rstd[j] = rstd_of(c + j);
    if (args.d_shift.data != nullptr) norm_write_tile(args.d_shift, b, c, n, p_of);
    if (args.d_scale.data != nullptr) {
      at_level<ScaleGradient>(of, p_of, q_of, static_cast<double*>(made), n);
      norm_write_tile(args.d_scale, b, c, n, made);
    }
    if (args.d_add.data != nullptr) {
      at_level<AddGradient>(p, of, p_of, static_cast<const double*>(rstd), static_cast<double*>(made), n);
      norm_write_tile(args.d_add, b, c, n, made);
    }
  });
}

template <bool active, class T, class S>
void apply(const GroupNormArgs& args, const NormRegion& region, const Kept<T>& kept) {
  constexpr int64_t kBuffer = std::is_same_v<S, Half> ? kNormPiece : 1;
  T g_buffer[kBuffer], x_buffer[kBuffer], dx_buffer[kBuffer];
  const NormProblem& p = args.problem;
  for_elements<S>(p, region, [&](const NormPiece& piece) {
    int64_t g_stride, x_stride, dx_stride;
    const NormElement<S, T>* x = norm_load<S>(args.x, piece, x_buffer, x_stride);
    NormElement<S, T>* dx = norm_target<S>(args.out, piece, dx_buffer, dx_stride);
    const T *factors = norm_factors<T>(args, piece.b) + piece.c, *gu = kept.of(piece);
    const auto run = [&](auto body, const auto* g, int64_t stride) {
      at_level<decltype(body)>(g, stride, x, x_stride, dx, dx_stride, factors, p.channels, piece.rows, piece.n);
    };
    if (gu != nullptr) {
      p.channels_last ? run(ApplyColumns<false>{}, gu, piece.stride) : run(ApplyRows<false>{}, gu, piece.stride);
    } else {
      const NormElement<S, T>* g = norm_load<S>(args.grad_out, piece, g_buffer, g_stride);
      p.channels_last ? run(ApplyColumns<active>{}, g, g_stride) : run(ApplyRows<active>{}, g, g_stride);
    }
    norm_store<S>(args.out, piece, dx_buffer);
  });
}

// d weight and d bias of channels c .. c + n - 1: the samples one after the other.
struct ParameterLoop {
  DK_BODY static void run(const double* scale, const double* of, double* sums, int64_t n) {
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) sums[j] = fma(add(1.0, scale[j]), of[j], sums[j]);
  }
};

void parameters(const GroupNormArgs& args, int64_t tile) {
  const NormProblem& p = args.problem;
  const int64_t c = tile * kNormTile, n = std::min(kNormTile, p.channels - c);
  for (int part = 0; part < 2; ++part) {
    const ChannelView& into = part == 0 ? args.d_bias : args.d_weight;
    if (into.data == nullptr) continue;
    double sums[kNormTile] = {}, scale[kNormTile];
    for (int64_t b = 0; b < p.batch; ++b) {
      norm_read_tile(args.scale, b, c, n, 0.0, scale);
      at_level<ParameterLoop>(static_cast<const double*>(scale),
                              static_cast<const double*>(norm_sums(args, b, c) + part * p.channels),
                              static_cast<double*>(sums), n);
    }
    norm_write_tile(into, 0, c, n, sums);
  }
}

template <bool active, class T, class S>
void whole(const GroupNormArgs& args, const NormRegion& region, const Kept<T>& kept) {
  norm_make_factors<T>(args, region.b, region.c, region.c_end);
  sums<active, T, S>(args, region, kept);
  finish<T>(args, region.b, region.c, region.c_end);
  apply<active, T, S>(args, region, kept);
}

// The same with gu in memory of its own, where x has 16 bits and what is to be kept is little.
template <bool active, class T, class S>
void whole_narrow(const GroupNormArgs& args, const NormRegion& region) {
  constexpr int64_t kLittle = 32768;
  const NormProblem& p = args.problem;
  if (!active || (region.c_end - region.c) * p.positions > kLittle) {
    return whole<active, T, S>(args, region, {nullptr, 0});
  }
  T buffer[kLittle];
  whole<active, T, S>(args, region, {buffer, p.channels_last ? 0 : region.c * p.positions});
}

template <bool active, class T, class S>
void run(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const NormProblem& p = args.problem;
  const auto kept_of = [&](int64_t b) {
    if constexpr (std::is_same_v<T, S>) return kept_in_place<T>(args, b);
    return Kept<T>{nullptr, 0};
  };
  for (int64_t task = begin; task < end; ++task) {
    if (phase == group_norm_grad_phases(p) - 1) {
      parameters(args, task);
    } else if (norm_is_whole(p)) {
      const NormRegion region = norm_whole(p, task);
      if constexpr (std::is_same_v<T, S>) {
        whole<active, T, S>(args, region, kept_of(region.b));
      } else {
        whole_narrow<active, T, S>(args, region);
      }
    } else if (phase == 0) {
      const NormRegion region = norm_bundle_of(p, task);
      norm_make_factors<T>(args, region.b, region.c, region.c_end);
    } else if (phase == 2) {
      const NormRegion region = norm_bundle_of(p, task);
      finish<T>(args, region.b, region.c, region.c_end);
    } else {
      const NormRegion region = norm_part(p, task);
      phase == 1 ? sums<active, T, S>(args, region, kept_of(region.b))
                 : apply<active, T, S>(args, region, kept_of(region.b));
    }
  }
}

}  // namespace

int64_t group_norm_grad_phases(const NormProblem& problem) { return norm_is_whole(problem) ? 2 : 5; }

int64_t group_norm_grad_tasks(const NormProblem& p, int64_t phase) {
  if (phase == group_norm_grad_phases(p) - 1) return (p.channels + kNormTile - 1) / kNormTile;
  if (norm_is_whole(p)) return norm_whole_tasks(p);
  return phase % 2 == 0 ? p.batch * norm_bundles(p) : norm_pass_tasks(p);
}

void group_norm_grad(const GroupNormArgs& args, int64_t phase, int64_t begin, int64_t end) {
  norm_for_dtype(args.x.dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using S = decltype(s);
    args.problem.silu ? run<true, T, S>(args, phase, begin, end) : run<false, T, S>(args, phase, begin, end);
  });
}

}  // namespace dk::cpu
