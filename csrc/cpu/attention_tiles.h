// The inner loops of attention, one table of them for every instruction set; forward and backward are written in them,
// and the products of convolutions (conv3x3.cpp).
// A tile is a small matrix in scratch memory whose rows are vectors: queries (or channels) lie on the columns.
#pragma once

#include "../core/dtype.h"

namespace dk::cpu {

constexpr int64_t kTileLanes = 16;  // the columns of tiles are a multiple of it, at every level (but see `lanes`)

// Of attention: longer chains would round worse than torch's; shorter ones would cost time.
constexpr int64_t kTileDepth = 48;

// Two neighbours along the summed axis, the first one in the low half: what a bfloat16 dot product takes.
struct Pair {
  uint32_t bits;
};

// c[i][j] (+)= sum_k a(i, k) b[k][j]. T is float, or Pair (then k counts pairs and b[k][j] is a pair of rows of b).
// The sum over k is that of chains of at most `chain` terms, added to c if `accumulate`.
template <class T>
struct TileProduct {
  const T* a;  // a(i, k) at a + i a_row + k a_depth, any alignment: read element by element
  int64_t a_row, a_depth;
  const T* b;  // b[k][j] at b + k b_row + j, rows 64-byte aligned
  int64_t b_row;
  float* c;  // c[i][j] at c + i c_row + j, rows 64-byte aligned
  int64_t c_row;
  int64_t rows, columns, depth;  // columns: a multiple of kTileLanes
  bool accumulate;
  int64_t chain = kTileDepth;  // a block of inputs in convolutions
};

// One tile of logits [keys][queries] becomes weights, with the running maximum and sum of every query (a column).
struct SoftmaxTile {
  float* logits;  // [keys][queries]; float32 weights replace them if pairs == nullptr
  Pair* pairs;    // [ceil(keys / 2)][queries]: bfloat16 weights, an odd last key beside a zero
  int64_t keys, queries;
  float scale;     // >= 0, of the logits, times log2(e)
  float* maximum;  // [queries] of the logits; the lowest float before the first tile
  float* sum;      // [queries] of the weights, as rounded
  float* factor;   // [queries] out: what earlier sums and outputs must be multiplied with; sum already is
};

// One tile of the backward pass: logits and dP = dO V^T become the weights P = exp2(scale logits - offset) and the
// gradient of the scaled logits, dS = P (dP - delta). A query is a row here.
struct SoftmaxGradTile {
  float *logits, *dp;                // [queries][keys]; float32 P and dS replace them if weight_pairs == nullptr
  Pair *weight_pairs, *ds_pairs;     // [ceil(queries / 2)][keys]: bfloat16 P and dS, an odd last query beside a zero
  Pair* ds_rows;                     // [queries][keys / 2]: dS once more, as pairs of keys
  int64_t queries, keys;             // keys: a multiple of kTileLanes
  float scale;                       // of the logits, times log2(e)
  const float *offset, *offset_low;  // [queries]: log-sum-exp times log2(e), and what rounding that left
  const float* delta;                // [queries]
};

// Few queries or keys need no tiles: rows are read as they lie, any alignment, of float32 or widened as they are read.
struct RowDots {
  Dtype dtype;  // of a and b
  const void* a;
  int64_t a_row;
  const void* b;
  int64_t b_row;
  float* c;  // c[i][j] = row i of a . row j of b, for j up to the next multiple of 4, where it is a copy
  int64_t c_row, rows, columns, depth;
};

// c[i][j] (+)= sum_k w(i, k) v[k][j], then times factor[i] unless that is null; depth <= 2 kTileDepth, in two chains.
struct RowMix {
  Dtype dtype;  // of v
  const float* w;
  int64_t w_row, w_depth;
  const void* v;
  int64_t v_row;
  float* c;  // rows of any alignment
  int64_t c_row, rows, columns, depth;
  bool accumulate;
  const float* factor;
};

// As SoftmaxTile, with a query a row of `row` floats, a multiple of kTileLanes, 64-byte aligned.
struct SoftmaxRows {
  float* logits;
  int64_t row, queries, keys;
  float scale;
  float *maximum, *sum, *factor;
};

struct RowKernels {
  int64_t few_queries;  // up to so many, rows are faster than tiles
  void (*dots)(const RowDots&);
  void (*mix)(const RowMix&);
  bool (*softmax)(const SoftmaxRows&);
  void (*scale)(float* c, int64_t c_row, int64_t rows, int64_t columns, const float* factor);  // c[i][j] *= factor[i]
};

struct AttentionTiles {
  const char* name;  // of the instructions of float32 products
  int64_t lanes;     // what the columns of `multiply`, `softmax` and `scale_columns` are a multiple of
  void (*multiply)(const TileProduct<float>&);
  void (*multiply_pairs)(const TileProduct<Pair>&);  // null without bfloat16 dot products, as all that speaks of pairs
  // Returns whether a factor differs from 1 (NaN does).
  bool (*softmax)(const SoftmaxTile&);
  // c[i][j] *= factor[j]
  void (*scale_columns)(float* c, int64_t c_row, int64_t rows, int64_t columns, const float* factor);
  void (*softmax_grad)(const SoftmaxGradTile&);
  // sum[i] += P of query i over the first `keys` keys (of a row of t.keys); needs no more of t than P does.
  void (*weight_sums)(const SoftmaxGradTile& t, int64_t keys, double* sum);
  // sum[j] += sum_i a[i][j] b[i][j], the chain of a product of one row of a with column j of b. Rows of `columns`.
  void (*dot_columns)(const float* a, const float* b, int64_t rows, int64_t columns, float* sum);
  void (*dot_columns_pairs)(const Pair* a, const Pair* b, int64_t rows, int64_t columns, float* sum);
  const RowKernels& rows;
};

const AttentionTiles& attention_tiles();  // of the level in use (isa.h)

extern const AttentionTiles kScalarTiles;
#if defined(__x86_64__)
extern const AttentionTiles kAvx2Tiles, kAvx512Tiles, kAvx512Bf16Tiles;
#endif

}  // namespace dk::cpu
