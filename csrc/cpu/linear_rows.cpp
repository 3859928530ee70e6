// A linear layer row by row: tiles of weights against blocks of rows, so that each weight is fetched once a block.
#include "../core/linear_rows.h"

#include <algorithm>

#include "blocks.h"
#include "levels.h"

namespace dk::cpu {
namespace {

constexpr int kColumns = 8;      // outputs of a task
constexpr int64_t kRows = 24;    // rows of a task
constexpr int64_t kDepth = 512;  // inputs at a time: the weights of a task and some rows of x fit in the L1 cache
constexpr int kLanes = kLinearLanes;

// Some inputs of `Rows` rows and `Columns` columns, whose lanes are in registers meanwhile, `Part` of them at a time.
template <int Part, int Rows, int Columns, class T>
DK_BODY void add_products(const T* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t depth, T* lanes) {
  constexpr int kParts = kLanes / Part;
  T sum[kParts][Rows][Columns][Part];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int column = 0; column < Columns; ++column) {
        for (int j = 0; j < Part; ++j)
          sum[part][r][column][j] = lanes[(r * kColumns + column) * kLanes + part * Part + j];
      }
    }
  }
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
        for (int column = 0; column < Columns; ++column) {
          for (int j = 0; j < Part; ++j) {
            const int64_t at = k + part * Part + j;
            sum[part][r][column][j] = fma(x[r * x_stride + at], w[column * w_stride + at], sum[part][r][column][j]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int column = 0; column < Columns; ++column) {
      T* to = lanes + (r * kColumns + column) * kLanes;
#pragma GCC unroll 2
      for (int part = 0; part < kParts; ++part) {
        for (int j = 0; j < Part; ++j) to[part * Part + j] = sum[part][r][column][j];
      }
      for (int64_t k = whole; k < depth; ++k) {
        to[k - whole] = fma(x[r * x_stride + k], w[column * w_stride + k], to[k - whole]);
      }
    }
  }
}

// Part: lanes of a vector.
template <int Part>
struct AddProducts {
  template <class T>
  DK_BODY static void run(const T* x, int64_t x_stride, int64_t rows, const T* w, int64_t w_stride, int64_t columns,
                          int64_t depth, T* lanes) {
    int64_t r = 0;
    for (; r + 3 <= rows; r += 3, x += 3 * x_stride, lanes += 3 * kColumns * kLanes) {
      int64_t c = 0;
      for (; c + 2 <= columns; c += 2) {
        add_products<Part, 3, 2>(x, x_stride, w + c * w_stride, w_stride, depth, lanes + c * kLanes);
      }
      if (c < columns) add_products<Part, 3, 1>(x, x_stride, w + c * w_stride, w_stride, depth, lanes + c * kLanes);
    }
    for (; r < rows; ++r, x += x_stride, lanes += kColumns * kLanes) {
      int64_t c = 0;
      for (; c + 4 <= columns; c += 4) {
        add_products<Part, 1, 4>(x, x_stride, w + c * w_stride, w_stride, depth, lanes + c * kLanes);
      }
      for (; c < columns; ++c) {
        add_products<Part, 1, 1>(x, x_stride, w + c * w_stride, w_stride, depth, lanes + c * kLanes);
      }
    }
  }
};

struct Fold {
  template <class T>
  DK_BODY static void run(const T* lanes, int64_t rows, const T* bias, T* values) {
    constexpr int kHalf = kLanes / 2;
    T folded[kColumns * kHalf];
    for (int64_t r = 0; r < rows; ++r, lanes += kColumns * kLanes, values += kColumns) {
      for (int column = 0; column < kColumns; ++column) {
        for (int j = 0; j < kHalf; ++j)
          folded[column * kHalf + j] = add(lanes[column * kLanes + j], lanes[column * kLanes + kHalf + j]);
      }
      for (int column = 0; column < kColumns; ++column) values[column] = linear_fold(folded + column * kHalf);
      for (int column = 0; bias != nullptr && column < kColumns; ++column)
        values[column] = add(values[column], bias[column]);
    }
  }
};

struct Silu {
  template <class T>
  DK_BODY static void run(T* x, int64_t n) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) x[i] = silu(x[i]);
  }
};

template <class T>
const T* read(Dtype dtype, const void* data, int64_t offset, int64_t n, T* buffer) {
  const char* from = static_cast<const char*>(data) + offset * size_of(dtype);
  if (dtype == kDtypeOf<T>) return reinterpret_cast<const T*>(from);
  widen(dtype, from, buffer, n);
  return buffer;
}

template <class T>
void prepare(const LinearRowsArgs& args, int64_t r) {
  T* to = static_cast<T*>(args.prepared) + r * args.inputs;
  const T* from = read(args.dtype, args.x.data, r * args.x.stride, args.inputs, to);
  if (from != to) std::copy(from, from + args.inputs, to);
  if (args.silu) at_level<Silu>(to, args.inputs);
}

template <class T>
void multiply(const LinearRowsArgs& args, int64_t task) {
  const int64_t tiles = (args.outputs + kColumns - 1) / kColumns;
  const int64_t row = task / tiles * kRows, column = task % tiles * kColumns;
  const int64_t rows = std::min(kRows, args.rows - row), columns = std::min<int64_t>(kColumns, args.outputs - column);
  alignas(64) T lanes[kRows * kColumns * kLanes];
  alignas(64) T buffer[kColumns * kDepth];
  std::fill(lanes, lanes + rows * kColumns * kLanes, T(0));

  const bool ready = args.prepared != nullptr;
  const int64_t x_stride = ready ? args.inputs : args.x.stride;
  const T* x = static_cast<const T*>(ready ? args.prepared : args.x.data) + row * x_stride;
  const bool direct = args.dtype == kDtypeOf<T>;
  for (int64_t k = 0; k < args.inputs; k += kDepth) {
    const int64_t depth = std::min(kDepth, args.inputs - k);
    const T* w = buffer;
    for (int64_t c = 0; c < columns; ++c) {
      const T* from =
          read(args.dtype, args.weight.data, (column + c) * args.weight.stride + k, depth, buffer + c * kDepth);
      if (c == 0) w = from;
    }
    const int64_t w_stride = direct ? args.weight.stride : kDepth;
    if (isa().loops == Loops::avx512 && sizeof(T) == 4) {
      at_level<AddProducts<kLanes>>(x + k, x_stride, rows, w, w_stride, columns, depth, lanes);
    } else {
      at_level<AddProducts<kLanes / 2>>(x + k, x_stride, rows, w, w_stride, columns, depth, lanes);
    }
  }

  T bias[kColumns] = {}, values[kRows * kColumns];
  for (int64_t c = 0; c < columns && args.bias != nullptr; ++c) {
    bias[c] = *read(args.dtype, args.bias, (column + c) * args.bias_stride, 1, bias + c);
  }
  const T* given = args.bias == nullptr ? nullptr : bias;
  at_level<Fold>(lanes, rows, given, values);
  for (int64_t r = 0; r < rows; ++r) {
    char* to = static_cast<char*>(args.out.data) + ((row + r) * args.out.stride + column) * size_of(args.dtype);
    narrow(values + r * kColumns, args.dtype, to, columns);
  }
}

template <class T>
void run(const LinearRowsArgs& args, bool prepares, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) prepares ? prepare<T>(args, task) : multiply<T>(args, task);
}

}  // namespace

bool linear_rows_prepares(const LinearRowsArgs& args) {
  return args.silu || args.dtype == Dtype::f16 || args.dtype == Dtype::bf16;
}

int64_t linear_rows_phases(const LinearRowsArgs& args) { return args.prepared != nullptr ? 2 : 1; }

int64_t linear_rows_tasks(const LinearRowsArgs& args, int64_t phase) {
  if (phase == 0 && args.prepared != nullptr) return args.rows;
  return (args.rows + kRows - 1) / kRows * ((args.outputs + kColumns - 1) / kColumns);
}

void linear_rows(const LinearRowsArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const bool prepares = phase == 0 && args.prepared != nullptr;
  args.dtype == Dtype::f64 ? run<double>(args, prepares, begin, end) : run<float>(args, prepares, begin, end);
}

}  // namespace dk::cpu
