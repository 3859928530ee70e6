// Winograd's convolution strip by strip: some tiles of all inputs against a few panels of weights.
#include "../core/conv3x3.h"

#include <algorithm>

#include "attention_pack.h"
#include "levels.h"
#include "winograd.h"

namespace dk::cpu {
namespace {

constexpr int64_t kTiles = 24, kPanels = 2;  // of a task
constexpr int64_t kFewTiles = 8 * kTiles;    // up to so many in all, tasks are of one panel and more tiles
constexpr int64_t kTilesOfFew = 48;
constexpr int64_t kInputs = 96;  // at a time: what they become and the sums fit in the L2 cache

template <class W>
constexpr ConvShape kShape = kConvShapes[static_cast<int64_t>(W::kForm)];

// B^T d B of `n` channels of one tile: d[i] are its pixels, v is [points][tiles][channels].
template <class W>
struct Input {
  DK_BODY static void run(const float* const* d, int64_t n, float* v, int64_t v_point) {
    constexpr int kPixels = kShape<W>.pixels, kPoints = kShape<W>.points;
#pragma GCC ivdep
    for (int64_t c = 0; c < n; ++c) {
      float rows[kPoints][kPixels];
#pragma GCC unroll 6
      for (int j = 0; j < kPixels; ++j) {
        float column[kPixels], made[kPoints];
#pragma GCC unroll 6
        for (int r = 0; r < kPixels; ++r) column[r] = d[r * kPixels + j][c];
        W::input(column, made);
#pragma GCC unroll 6
        for (int r = 0; r < kPoints; ++r) rows[r][j] = made[r];
      }
#pragma GCC unroll 6
      for (int r = 0; r < kPoints; ++r) {
        float made[kPoints];
        W::input(rows[r], made);
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) v[(r * kPoints + j) * v_point + c] = made[j];
      }
    }
  }
};

// A^T s A + bias of `n` outputs of one tile, to the pixels `out`.
template <class W>
struct Output {
  DK_BODY static void run(const float* s, int64_t s_point, const float* bias, int64_t n, float* const* out) {
    constexpr int kPoints = kShape<W>.points, kOut = kShape<W>.outputs;
#pragma GCC ivdep
    for (int64_t k = 0; k < n; ++k) {
      float rows[kOut][kPoints];
#pragma GCC unroll 6
      for (int j = 0; j < kPoints; ++j) {
        float column[kPoints], made[kOut];
#pragma GCC unroll 6
        for (int r = 0; r < kPoints; ++r) column[r] = s[(r * kPoints + j) * s_point + k];
        W::output(column, made);
#pragma GCC unroll 4
        for (int r = 0; r < kOut; ++r) rows[r][j] = made[r];
      }
#pragma GCC unroll 4
      for (int r = 0; r < kOut; ++r) {
        float made[kOut];
        W::output(rows[r], made);
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) out[r * kOut + j][k] = add(made[j], bias[k]);
      }
    }
  }
};

struct Tiling {
  int64_t across, down, all, strips, strip, panels;  // `strip` tiles and `panels` panels of weights are a task
};

Tiling tiling(const Conv3x3Args& args) {
  const int64_t step = kConvShapes[static_cast<int64_t>(args.form)].step;
  Tiling t{};
  t.across = (args.width + step - 1) / step;
  t.down = (args.height + step - 1) / step;
  t.all = args.batch * t.across * t.down;
  const bool few = t.all <= kFewTiles;
  const int64_t most = few ? kTilesOfFew : kTiles;
  t.strips = (t.all + most - 1) / most;
  t.strip = (t.all + t.strips - 1) / t.strips;
  t.panels = few ? 1 : kPanels;
  return t;
}

// Asks for memory that is read next.
void fetch(const float* from, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(float);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(from + i);
}

// The sums of products of some tiles, [points][tiles][width], over all inputs.
template <class W>
void multiply(const Conv3x3Args& args, const Tiling& all, int64_t first, int64_t tiles, int64_t panel, int64_t width,
              float* v, const float* zeros, float* sums) {
  constexpr int64_t kPixels = kShape<W>.pixels, kPoints = kShape<W>.points * kShape<W>.points;
  const int64_t blocks = (args.inputs + kInputs - 1) / kInputs;
  for (int64_t block = 0, c = 0, depth; block < blocks; ++block, c += depth) {
    depth = (args.inputs - c + blocks - block - 1) / (blocks - block);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t tile = first + i, sample = tile / (all.across * all.down);
      const int64_t top = tile / all.across % all.down * kShape<W>.step - 1,
                    left = tile % all.across * kShape<W>.step - 1;
      const float* d[kPixels * kPixels];
      for (int64_t p = 0; p < kPixels * kPixels; ++p) {
        const int64_t y = top + p / kPixels, x = left + p % kPixels;
        const bool inside = y >= 0 && y < args.height && x >= 0 && x < args.width;
        d[p] = inside ? args.x + sample * args.x_batch + y * args.x_row + x * args.x_pixel + c : zeros;
      }
      at_level<Input<W>>(static_cast<const float* const*>(d), depth, v + i * depth, tiles * depth);
    }
    for (int64_t p = 0; p < kPoints; ++p) {
      for (int64_t k = 0; k < width; k += kConvPanel) {
        const float* u = args.packed + ((p * args.panels + panel + k / kConvPanel) * args.inputs + c) * kConvPanel;
        const float* next = k + kConvPanel < width
                                ? u + args.inputs * kConvPanel
                                : u + (args.panels * args.inputs - k / kConvPanel * args.inputs) * kConvPanel;
        if (k + kConvPanel < width || p + 1 < kPoints) fetch(next, depth * kConvPanel);
        attention_tiles().multiply({v + p * tiles * depth, depth, 1, u, kConvPanel, sums + p * tiles * width + k, width,
                                    tiles, std::min(kConvPanel, width - k), depth, block > 0, kInputs});
      }
    }
  }
}

template <class W>
void strip(const Conv3x3Args& args, const Tiling& all, int64_t first, int64_t panel) {
  constexpr int64_t kOut = kShape<W>.outputs, kPoints = kShape<W>.points * kShape<W>.points;
  constexpr int64_t kScale = kShape<W>.outputs / kShape<W>.step;
  const int64_t tiles = std::min(all.strip, all.all - first);
  const int64_t begin = (args.panel + panel) * kConvPanel;
  const int64_t outputs = std::min({args.outputs - begin, all.panels * kConvPanel, (args.panels - panel) * kConvPanel});
  const int64_t width = round_up(outputs, kTileLanes), none = std::max(std::min(args.inputs, kInputs), outputs);

  Arena count(nullptr);
  const auto take = [&](Arena& from, float*& v, float*& sums, float*& zeros, float*& nowhere) {
    v = from.take<float>(kPoints * tiles * std::min(args.inputs, kInputs));
    sums = from.take<float>(kPoints * tiles * width);
    zeros = from.take<float>(none);
    nowhere = from.take<float>(outputs);
  };
  float *v, *sums, *zeros, *nowhere;
  take(count, v, sums, zeros, nowhere);
  Arena arena(scratch(count.used()));
  take(arena, v, sums, zeros, nowhere);
  std::fill(zeros, zeros + none, 0.0f);
  if (args.inputs == 0) std::fill(sums, sums + kPoints * tiles * width, 0.0f);

  multiply<W>(args, all, first, tiles, panel, width, v, zeros, sums);

  const int64_t out_height = kScale * args.height, out_width = kScale * args.width;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t tile = first + i, sample = tile / (all.across * all.down);
    const int64_t top = tile / all.across % all.down * kOut, left = tile % all.across * kOut;
    float* out[kOut * kOut];
    for (int64_t p = 0; p < kOut * kOut; ++p) {
      const int64_t y = top + p / kOut, x = left + p % kOut;
      const bool inside = y < out_height && x < out_width;
      const int64_t at = ((sample * out_height + y) * out_width + x) * args.outputs + begin;
      out[p] = inside ? args.out + at : nowhere;
    }
    const float* bias = args.bias == nullptr ? zeros : args.bias + begin;
    at_level<Output<W>>(static_cast<const float*>(sums + i * width), tiles * width, bias, outputs,
                        static_cast<float* const*>(out));
  }
}

constexpr int64_t kSquare = 16;  // inputs and outputs whose weights are brought together before they are transformed

// G g G^T of kSquare outputs of one input. g: [9][kSquare].
template <class W>
struct Weights {
  DK_BODY static void run(const float* g, float* u, int64_t u_point) {
    constexpr int kPoints = kShape<W>.points;
#pragma GCC ivdep
    for (int64_t k = 0; k < kSquare; ++k) {
      float rows[3][kPoints];
#pragma GCC unroll 3
      for (int r = 0; r < 3; ++r) {
        const float taps[3] = {g[3 * r * kSquare + k], g[(3 * r + 1) * kSquare + k], g[(3 * r + 2) * kSquare + k]};
        W::weight(taps, rows[r]);
      }
#pragma GCC unroll 6
      for (int j = 0; j < kPoints; ++j) {
        const float column[3] = {rows[0][j], rows[1][j], rows[2][j]};
        float made[kPoints];
        W::weight(column, made);
#pragma GCC unroll 6
        for (int r = 0; r < kPoints; ++r) u[(r * kPoints + j) * u_point + k] = made[r];
      }
    }
  }
};

// One square of weights, both places counted in squares.
template <class W>
void pack(const Conv3x3Weight& args, int64_t input, int64_t output) {
  const int64_t c0 = input * kSquare, k0 = (args.panel * kConvPanel) + output * kSquare;
  const int64_t inputs = std::min(kSquare, args.inputs - c0);
  const int64_t outputs = std::clamp<int64_t>(args.outputs - k0, 0, kSquare);
  float g[kSquare][9][kSquare];
  if (outputs < kSquare) std::fill(&g[0][0][0], &g[0][0][0] + sizeof g / sizeof(float), 0.0f);
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t tap = 0; tap < 9; ++tap) {
      const float* from = args.weight + (k0 + k) * args.stride[0] + c0 * args.stride[1] + tap / 3 * args.stride[2] +
                          tap % 3 * args.stride[3];
      for (int64_t c = 0; c < inputs; ++c) g[c][tap][k] = from[c * args.stride[1]];
    }
  }
  constexpr int64_t kInPanel = kConvPanel / kSquare;
  for (int64_t c = 0; c < inputs; ++c) {
    float* u = args.packed + (output / kInPanel * args.inputs + c0 + c) * kConvPanel + output % kInPanel * kSquare;
    at_level<Weights<W>>(static_cast<const float*>(&g[c][0][0]), u, args.panels * args.inputs * kConvPanel);
  }
}

int64_t input_squares(const Conv3x3Weight& args) { return (args.inputs + kSquare - 1) / kSquare; }

}  // namespace

int64_t conv3x3_tasks(const Conv3x3Args& args) {
  const Tiling all = tiling(args);
  return all.strips * ((args.panels + all.panels - 1) / all.panels);
}

void conv3x3(const Conv3x3Args& args, int64_t begin, int64_t end) {
  const Tiling all = tiling(args);
  const auto run = args.form == ConvForm::f2   ? strip<WinogradF2>
                   : args.form == ConvForm::f4 ? strip<WinogradF4>
                                               : strip<WinogradUpsampled>;
  for (int64_t task = begin; task < end; ++task) {
    run(args, all, task % all.strips * all.strip, task / all.strips * all.panels);
  }
}

int64_t conv3x3_pack_tasks(const Conv3x3Weight& args) {
  return input_squares(args) * (args.panels * kConvPanel / kSquare);
}

void conv3x3_pack(const Conv3x3Weight& args, int64_t begin, int64_t end) {
  const auto run = args.form == ConvForm::f2   ? pack<WinogradF2>
                   : args.form == ConvForm::f4 ? pack<WinogradF4>
                                               : pack<WinogradUpsampled>;
  const int64_t across = input_squares(args);
  for (int64_t task = begin; task < end; ++task) run(args, task % across, task / across);
}

}  // namespace dk::cpu
