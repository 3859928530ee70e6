#include "attention_pack.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "isa.h"

namespace dk::cpu {
namespace {

void widen_row(Dtype dtype, const char* in, float* out, int64_t n) {
  switch (dtype) {
    case Dtype::f16:
      return isa().widen_f16(reinterpret_cast<const Half*>(in), out, n);
    case Dtype::bf16:
      return isa().widen_bf16(reinterpret_cast<const Bfloat16*>(in), out, n);
    default:
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
  }
}

void narrow_row(Dtype dtype, const float* in, char* out, int64_t n) {
  switch (dtype) {
    case Dtype::f16:
      return isa().narrow_f16(in, reinterpret_cast<Half*>(out), n);
    case Dtype::bf16:
      return isa().narrow_bf16(in, reinterpret_cast<Bfloat16*>(out), n);
    default:
      std::memcpy(out, in, static_cast<size_t>(n) * sizeof(float));
  }
}

// Asks for a row that is read a few rows later: rows may lie on pages of their own, where no hardware looks ahead.
constexpr int64_t kRowsAhead = 8;
void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at);
}

uint16_t load_half(const char* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// out[i] = (even[i], odd[i]) of two rows of bfloat16; odd may be null, for zeros.
void interleave(const char* even, const char* odd, int64_t n, Pair* out) {
  if (odd == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i].bits = load_half(even + 2 * i);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    out[i].bits = load_half(even + 2 * i) | static_cast<uint32_t>(load_half(odd + 2 * i)) << 16;
  }
}

typedef uint32_t Words __attribute__((vector_size(16)));

Words load_words(const char* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// out(j, i) = in(i, j) of four rows and four columns of 32-bit words; strides of rows in bytes.
void transpose_block(const char* in, int64_t in_row, char* out, int64_t out_row) {
  const Words a = load_words(in), b = load_words(in + in_row);
  const Words c = load_words(in + 2 * in_row), d = load_words(in + 3 * in_row);
  const Words ab0 = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab1 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Words cd0 = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd1 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Words result[4] = {__builtin_shufflevector(ab0, cd0, 0, 1, 4, 5), __builtin_shufflevector(ab0, cd0, 2, 3, 6, 7),
                           __builtin_shufflevector(ab1, cd1, 0, 1, 4, 5),
                           __builtin_shufflevector(ab1, cd1, 2, 3, 6, 7)};
  for (int k = 0; k < 4; ++k) std::memcpy(out + k * out_row, &result[k], sizeof(Words));
}

// out(j, i) = in(i, j), sixteen rows at a time: whole cache lines of `out`.
void transpose(const char* in, int64_t in_row, int64_t rows, int64_t columns, char* out, int64_t out_row) {
  for (int64_t from = 0; from < rows; from += 16) {
    const int64_t to = std::min(from + 16, rows), whole = from + (to - from) / 4 * 4;
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t last = std::min(j + 4, columns);
      int64_t i = from;
      if (last == j + 4) {
        for (; i < whole; i += 4) transpose_block(in + i * in_row + j * 4, in_row, out + j * out_row + i * 4, out_row);
      }
      for (; i < to; ++i) {
        for (int64_t k = j; k < last; ++k) std::memcpy(out + k * out_row + i * 4, in + i * in_row + k * 4, 4);
      }
    }
  }
}

template <class T>
void clear_columns(T* tile, int64_t rows, int64_t from, int64_t columns) {
  if (from == columns) return;
  for (int64_t i = 0; i < rows; ++i) std::memset(tile + i * columns + from, 0, (columns - from) * sizeof(T));
}

void flip_signs(void* tile, int64_t words, uint32_t mask) {
  char* p = static_cast<char*>(tile);
  for (int64_t i = 0; i < words; ++i) {
    uint32_t word;
    std::memcpy(&word, p + 4 * i, 4);
    word ^= mask;
    std::memcpy(p + 4 * i, &word, 4);
  }
}

// Pairs along the contiguous axis of [rows][n]; the length of a row in the buffer, in pairs.
int64_t copy_pairs(const char* in, int64_t row, int64_t rows, int64_t n, Pair* buffer) {
  const int64_t pairs = (n + 1) / 2;
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) prefetch_row(in + (i + kRowsAhead) * row * 2, n * 2);
    Pair* to = buffer + i * pairs;
    to[pairs - 1].bits = 0;
    std::memcpy(to, in + i * row * 2, static_cast<size_t>(n) * 2);
  }
  return pairs;
}

// Pairs of rows of [rows][n], each pair of rows `n` pairs.
void interleave_rows(const char* in, int64_t row, int64_t rows, int64_t n, Pair* buffer) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t ahead = i + kRowsAhead; ahead < std::min(i + kRowsAhead + 2, rows); ++ahead) {
      prefetch_row(in + ahead * row * 2, n * 2);
    }
    interleave(in + i * row * 2, i + 1 < rows ? in + (i + 1) * row * 2 : nullptr, n, buffer + i / 2 * n);
  }
}

}  // namespace

Left<float> left_floats(const Slice& slice, int64_t tokens, int64_t channels, float* buffer) {
  const bool by_token = slice.channel == 1;  // rows are tokens
  const int64_t stride = by_token ? slice.token : slice.channel;
  const int64_t rows = by_token ? tokens : channels, n = by_token ? channels : tokens;
  const int64_t bytes = size_of(slice.dtype);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) prefetch_row(slice.data + (i + kRowsAhead) * stride * bytes, n * bytes);
    widen_row(slice.dtype, slice.data + i * stride * bytes, buffer + i * n, n);
  }
  return by_token ? Left<float>{buffer, n, 1} : Left<float>{buffer, 1, n};
}

Left<Pair> left_channel_pairs(const Slice& slice, int64_t tokens, int64_t channels, Pair* buffer) {
  if (slice.channel == 1) return {buffer, copy_pairs(slice.data, slice.token, tokens, channels, buffer), 1};
  interleave_rows(slice.data, slice.channel, channels, tokens, buffer);
  return {buffer, 1, tokens};
}

Left<Pair> left_token_pairs(const Slice& slice, int64_t tokens, int64_t channels, Pair* buffer) {
  if (slice.token == 1) return {buffer, 1, copy_pairs(slice.data, slice.channel, channels, tokens, buffer)};
  interleave_rows(slice.data, slice.token, tokens, channels, buffer);
  return {buffer, channels, 1};
}

void pack_columns(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, bool negate, float* tile,
                  float* room) {
  const int64_t bytes = size_of(slice.dtype);
  if (slice.channel != 1) {
    for (int64_t c = 0; c < channels; ++c) {
      widen_row(slice.dtype, slice.data + c * slice.channel * bytes, tile + c * columns, tokens);
    }
  } else {
    for (int64_t i = 0; i < tokens; ++i) {
      widen_row(slice.dtype, slice.data + i * slice.token * bytes, room + i * channels, channels);
    }
    transpose(reinterpret_cast<const char*>(room), channels * 4, tokens, channels, reinterpret_cast<char*>(tile),
              columns * 4);
  }
  clear_columns(tile, channels, tokens, columns);
  if (negate) flip_signs(tile, channels * columns, 0x80000000u);
}

void pack_columns(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, bool negate, Pair* tile) {
  if (slice.channel != 1) {
    for (int64_t c = 0; c < channels; c += 2) {
      const char* even = slice.data + c * slice.channel * 2;
      interleave(even, even + slice.channel * 2, tokens, tile + c / 2 * columns);
    }
  } else {
    transpose(slice.data, slice.token * 2, tokens, channels / 2, reinterpret_cast<char*>(tile), columns * 4);
  }
  clear_columns(tile, channels / 2, tokens, columns);
  if (negate) flip_signs(tile, channels / 2 * columns, 0x80008000u);
}

void unpack_columns(const float* tile, int64_t tokens, int64_t channels, int64_t columns, const Slice& slice,
                    float* room) {
  const int64_t bytes = size_of(slice.dtype);
  if (slice.channel != 1) {
    for (int64_t c = 0; c < channels; ++c) {
      narrow_row(slice.dtype, tile + c * columns, slice.data + c * slice.channel * bytes, tokens);
    }
  } else {
    transpose(reinterpret_cast<const char*>(tile), columns * 4, channels, tokens, reinterpret_cast<char*>(room),
              channels * 4);
    for (int64_t i = 0; i < tokens; ++i) {
      narrow_row(slice.dtype, room + i * channels, slice.data + i * slice.token * bytes, channels);
    }
  }
}

char* scratch(int64_t bytes) {
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<char, Free> memory;
  static thread_local int64_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory.reset(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 4096)))));
    if (memory == nullptr) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

}  // namespace dk::cpu
