#include "blocks.h"

#include <cstring>

#include "../core/cpu.h"

namespace dk::cpu {
namespace {

template <class From, class To>
void convert(const From* from, To* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<To>(from[i]);
}

// Stretches of a stored dtype to float32 and back: 16-bit ones by the instruction set in use.
void widen_span(const double* in, float* out, int64_t n) { convert(in, out, n); }
void widen_span(const float* in, float* out, int64_t n) {
  std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
}
void widen_span(const Half* in, float* out, int64_t n) { isa().widen_f16(in, out, n); }
void widen_span(const Bfloat16* in, float* out, int64_t n) { isa().widen_bf16(in, out, n); }
template <class S>
void widen_span(const S* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = dk::widen(in[i]);
}

void narrow_span(const float* in, double* out, int64_t n) { convert(in, out, n); }
void narrow_span(const float* in, float* out, int64_t n) { widen_span(in, out, n); }
void narrow_span(const float* in, Half* out, int64_t n) { isa().narrow_f16(in, out, n); }
void narrow_span(const float* in, Bfloat16* out, int64_t n) { isa().narrow_bf16(in, out, n); }
template <class S>
void narrow_span(const float* in, S* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dk::narrow(in[i], out[i]);
}

// One element of any dtype, for strided access.
template <class T>
T widen_one(Dtype dtype, const void* in) {
  switch (dtype) {
#define DK_WIDEN(NAME, TYPE, TORCH) \
  case Dtype::NAME:                 \
    return static_cast<T>(dk::widen(*static_cast<const TYPE*>(in)));
    DK_STORED_DTYPES(DK_WIDEN)
#undef DK_WIDEN
    case Dtype::u8:
      return static_cast<T>(dk::widen(*static_cast<const uint8_t*>(in)));
  }
  return T(0);
}

template <class T>
void narrow_one(T value, Dtype dtype, void* out) {
  switch (dtype) {
#define DK_NARROW(NAME, TYPE, TORCH) \
  case Dtype::NAME:                  \
    return dk::narrow(value, *static_cast<TYPE*>(out));
    DK_STORED_DTYPES(DK_NARROW)
#undef DK_NARROW
    case Dtype::u8:
      break;  // masks are never written
  }
}

template <class T>
void gather_any(const Space& space, const View& view, const Block& block, T* out) {
  if (space.layout != Layout::strided) {
    widen(view.dtype, address(view, block.sample * view.batch_stride + block.begin), out, block.n);
    return;
  }
  for_stretches(space, view, block, [&](int64_t offset, int64_t done, int64_t n, int64_t stride) {
    if (stride == 1) {
      widen(view.dtype, address(view, offset), out + done, n);
    } else {
      const int64_t step = stride * size_of(view.dtype);
      const char* from = address(view, offset);
      for (int64_t i = 0; i < n; ++i) out[done + i] = widen_one<T>(view.dtype, from + i * step);
    }
  });
}

template <class T>
void scatter_any(const Space& space, const View& view, const Block& block, const T* in) {
  if (space.layout != Layout::strided) {
    narrow(in, view.dtype, address(view, block.sample * view.batch_stride + block.begin), block.n);
    return;
  }
  for_stretches(space, view, block, [&](int64_t offset, int64_t done, int64_t n, int64_t stride) {
    if (stride == 1) {
      narrow(in + done, view.dtype, address(view, offset), n);
    } else {
      const int64_t step = stride * size_of(view.dtype);
      char* to = address(view, offset);
      for (int64_t i = 0; i < n; ++i) narrow_one(in[done + i], view.dtype, to + i * step);
    }
  });
}

// Normals of elements first .. first + n - 1 of a sample; returns where they begin in `buffer`.
const float* draw_run(uint64_t seed, uint64_t stream, int64_t first, int64_t n, float* buffer) {
  const int64_t q0 = first / 4, skip = first - 4 * q0;
  isa().normals(seed, stream, static_cast<uint64_t>(q0), (skip + n + 3) / 4, buffer);
  return buffer + skip;
}

}  // namespace

void widen(Dtype dtype, const void* in, float* out, int64_t n) {
  switch (dtype) {
#define DK_WIDEN(NAME, TYPE, TORCH) \
  case Dtype::NAME:                 \
    return widen_span(static_cast<const TYPE*>(in), out, n);
    DK_STORED_DTYPES(DK_WIDEN)
#undef DK_WIDEN
    case Dtype::u8:
      return widen_span(static_cast<const uint8_t*>(in), out, n);
  }
}

void widen(Dtype dtype, const void* in, double* out, int64_t n) {
  if (dtype == Dtype::f64) {
    std::memcpy(out, in, static_cast<size_t>(n) * sizeof(double));
    return;
  }
  float part[kBlock];
  widen(dtype, in, part, n);
  convert(part, out, n);
}

void narrow(const float* in, Dtype dtype, void* out, int64_t n) {
  switch (dtype) {
#define DK_NARROW(NAME, TYPE, TORCH) \
  case Dtype::NAME:                  \
    return narrow_span(in, static_cast<TYPE*>(out), n);
    DK_STORED_DTYPES(DK_NARROW)
#undef DK_NARROW
    case Dtype::u8:
      return;  // masks are never written
  }
}

void narrow(const double* in, Dtype dtype, void* out, int64_t n) {
  if (dtype == Dtype::f64) {
    std::memcpy(out, in, static_cast<size_t>(n) * sizeof(double));
    return;
  }
  float part[kBlock];
  convert(in, part, n);
  narrow(part, dtype, out, n);
}

void gather(const Space& space, const View& view, const Block& block, float* out) {
  gather_any(space, view, block, out);
}
void gather(const Space& space, const View& view, const Block& block, double* out) {
  gather_any(space, view, block, out);
}
void scatter(const Space& space, const View& view, const Block& block, const float* in) {
  scatter_any(space, view, block, in);
}
void scatter(const Space& space, const View& view, const Block& block, const double* in) {
  scatter_any(space, view, block, in);
}

const float* draw(const Space& space, const Block& block, uint64_t seed, uint64_t stream, float* buffer) {
  if (space.layout != Layout::channels_last) return draw_run(seed, stream, block.begin, block.n, buffer);
  // Position p = inner C + c: for each channel the block holds a run of consecutive inner indices.
  const int64_t channels = space.channels, inner = space.count / channels;
  float run[kNoiseRoom];
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t first = (block.begin - c + channels - 1) / channels;  // begin - c > -channels: rounds up correctly
    const int64_t skip = first * channels + c - block.begin;
    if (skip >= block.n) continue;
    const int64_t n = (block.n - skip + channels - 1) / channels;
    const float* z = draw_run(seed, stream, c * inner + first, n, run);
    for (int64_t i = 0; i < n; ++i) buffer[skip + i * channels] = z[i];
  }
  return buffer;
}

const double* draw(const Space& space, const Block& block, uint64_t seed, uint64_t stream, double* buffer) {
  float part[kNoiseRoom];
  convert(draw(space, block, seed, stream, part), buffer, block.n);
  return buffer;
}

int64_t blocks_per_sample(const Space& space) { return count_blocks(space); }

}  // namespace dk::cpu
