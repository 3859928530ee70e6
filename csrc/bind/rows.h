// The rows of a table that a call reads: by a host integer, by a tensor of indices, or one a sample. What lies on the
// host is checked here; a kernel gives NaN where a row of a device is none.
#pragma once

#include "operand.h"

namespace dk::bind {

inline const double* check_table(const char* op, const Operand& table, int64_t columns) {
  if (table.dtype != aoti_torch_dtype_float64()) fail(op, "table must be float64, got ", dtype_text(table.dtype));
  if (table.dims != 2 || table.sizes[1] != columns) {
    fail(op, "table must have shape [rows, ", columns, "], got ", shape_text(table));
  }
  if (table.strides[1] != 1 || (table.sizes[0] > 1 && table.strides[0] != columns)) {
    fail(op, "table must be contiguous, got strides ", shape_text(table.strides, table.dims));
  }
  return static_cast<const double*>(table.data());
}

// An index into the table: int64 or int32, one for all samples or one a sample; on the CPU its range is checked.
inline void check_index(const char* op, const Operand& index, int64_t batch, Rows& rows, bool on_host) {
  const bool narrow = index.dtype == aoti_torch_dtype_int32();
  if (!narrow && index.dtype != aoti_torch_dtype_int64()) {
    fail(op, "index must be int64 or int32, got ", dtype_text(index.dtype));
  }
  if (index.dims > 1 || (index.dims == 1 && index.sizes[0] != batch)) {
    fail(op, "index must have shape [] or [", batch, "], got ", shape_text(index));
  }
  rows.index = index.data();
  rows.index_is_int32 = narrow;
  rows.index_stride = index.dims == 1 ? index.strides[0] : 0;
  if (!on_host) return;
  for (int64_t b = 0; b < (index.dims == 1 ? batch : 1); ++b) {
    if (row_number(rows, b) < 0) {
      const int64_t at = b * rows.index_stride;
      const int64_t got =
          narrow ? static_cast<const int32_t*>(rows.index)[at] : static_cast<const int64_t*>(rows.index)[at];
      fail(op, "index must be in [0, ", rows.count, "), the rows of the table, got ", got, " for sample ", b);
    }
  }
}

inline void check_row_finite(const char* op, const double* row, int64_t columns, int64_t number) {
  for (int64_t k = 0; k < columns; ++k) {
    if (row[k] != row[k]) fail(op, "table must not hold NaN, got NaN in row ", number, ", column ", k);
  }
}

// check(row, number) for the rows of the first `samples` samples, where the host can read them.
template <class Backend, class Check>
void check_rows(const Rows& rows, int64_t columns, int64_t samples, const Check& check) {
  if constexpr (Backend::kHost) {
    for (int64_t b = 0; b < samples; ++b) {
      const int64_t number = row_number(rows, b);
      check(rows.table + number * columns, number);
    }
  }
}

// A row for each sample of `first`: by index, or row b of [B] rows, or one row for all.
template <class Backend>
Rows sample_rows(const char* op, const Operand& table, const Operand& index, const Operand& first, int64_t columns) {
  check_same_device(op, table, first);
  check_same_device(op, index, first);
  const int64_t batch = first.sizes[0];
  Rows rows{};
  rows.table = check_table(op, table, columns);
  rows.count = table.sizes[0];
  if (index) {
    check_index(op, index, batch, rows, Backend::kHost);
  } else {
    if (rows.count != 1 && rows.count != batch) {
      fail(op, "table must have 1 row or one a sample (", batch, ") when no index is given, got ", rows.count);
    }
    rows.step = rows.count == 1 ? 0 : 1;
  }
  check_rows<Backend>(rows, columns, batch,
                      [&](const double* row, int64_t number) { check_row_finite(op, row, columns, number); });
  return rows;
}

// The row of a step, for all samples of `first` by number, or by index. A row of a host table by number is returned, to
// travel in the arguments; any other is found by the kernel through `rows`, and nullptr returned.
template <class Backend, class Check>
const double* step_row(const char* op, const Operand& table, const Operand& index, int64_t number, const Operand& first,
                       int64_t columns, const Check& check, Rows& rows) {
  const double* values = check_table(op, table, columns);
  rows.count = table.sizes[0];
  rows.first = number;
  if (!index && (number < 0 || number >= rows.count)) {
    fail(op, "row must be in [0, ", rows.count, "), the rows of the table, got ", number);
  }
  if (!index && table.device_type == aoti_torch_device_type_cpu()) {
    check(values + number * columns, number);
    return values + number * columns;
  }
  check_same_device(op, table, first);
  rows.table = values;
  if (!index) return nullptr;
  check_same_device(op, index, first);
  check_index(op, index, first.sizes[0], rows, Backend::kHost);
  check_rows<Backend>(rows, columns, index.dims == 1 ? first.sizes[0] : 1, check);
  return nullptr;
}

}  // namespace dk::bind
