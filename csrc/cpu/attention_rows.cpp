#include "attention_rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/softmax.h"
#include "attention_pack.h"

namespace dk::cpu {
namespace {

constexpr int64_t kRowKeys = 4 * kTileDepth;  // of one pass of the softmax
constexpr int64_t kMixKeys = 2 * kTileDepth;  // of one pass of the products with v

// Tokens as rows of channels.
struct Rows {
  Dtype dtype;
  const char* data;
  int64_t row;
  const void* at(int64_t i) const { return data + i * row * size_of(dtype); }
};

class ByRows {
 public:
  explicit ByRows(const AttentionArgs& args)
      : args_(args),
        p_(args.problem),
        keys_on_lanes_(p_.queries < kTileLanes),
        queries_(std::min(p_.queries, kQueryTile)),
        keys_(std::min(p_.keys, kRowKeys)) {
    Arena count(nullptr);
    lay_out(count);
    Arena arena(scratch(count.used()));
    lay_out(arena);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t per_head = (p_.queries + kQueryTile - 1) / kQueryTile;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / per_head, first = task % per_head * kQueryTile;
      tile(head / p_.heads, head % p_.heads, first, std::min(kQueryTile, p_.queries - first));
    }
  }

 private:
  void lay_out(Arena& arena) {
    const int64_t wide = round_up(p_.dim, kTileLanes), queries = round_up(queries_, kTileLanes);
    out_ = arena.take<float>(in_place_ ? 0 : queries_ * wide);
    logits_ = arena.take<float>(keys_on_lanes_ ? queries_ * round_up(keys_, kTileLanes) : keys_ * queries);
    maximum_ = arena.take<float>(queries);
    sum_ = arena.take<float>(queries);
    factor_ = arena.take<float>(queries);
    const int64_t copied = in_place(p_.v) ? 0 : keys_, compared = q_and_k_in_place_ ? 0 : p_.dim;
    q_ = arena.take<float>(queries_ * compared);
    k_ = arena.take<float>(keys_ * compared);
    v_ = arena.take<float>(copied * p_.dim);
    room_ = arena.take<float>(std::max(queries_, keys_) * p_.dim);
  }

  static bool in_place(const HeadsView& view) { return view.channel == 1; }

  // Where they lie, or a copy in float32.
  Rows rows(const Slice& slice, int64_t tokens, bool in_place, float* copy) {
    if (in_place) return {slice.dtype, slice.data, slice.token};
    pack_columns(turned(slice), p_.dim, tokens, p_.dim, /*negate=*/false, copy, room_);
    return {Dtype::f32, reinterpret_cast<const char*>(copy), p_.dim};
  }

  // Rows of channels are what attention_pack.h calls columns of tokens, with the axes exchanged.
  static Slice turned(const Slice& slice) { return {slice.data, slice.dtype, slice.channel, slice.token}; }

  void tile(int64_t b, int64_t h, int64_t first, int64_t n) {
    const Slice k = head_of(p_.k, p_.dtype, b, h), v = head_of(p_.v, p_.dtype, b, h);
    const Rows q = rows(head_of(p_.q, p_.dtype, b, h).at(first, 0), n, q_and_k_in_place_, q_);
    std::fill_n(maximum_, round_up(n, kTileLanes), std::numeric_limits<float>::lowest());
    std::fill_n(sum_, round_up(n, kTileLanes), 0.0f);
    const Slice out = head_of(args_.out, p_.dtype, b, h).at(first, 0);
    float* c = in_place_ ? reinterpret_cast<float*>(out.data) : out_;
    const int64_t c_row = in_place_ ? out.token : wide_;
    for (int64_t key = 0; key < p_.keys; key += keys_) {
      const int64_t keys = std::min(keys_, p_.keys - key);
      const Rows v_rows = rows(v.at(key, 0), keys, in_place(p_.v), v_);
      add(q, rows(k.at(key, 0), keys, q_and_k_in_place_, k_), v_rows, n, keys, key, c, c_row);
    }
    if (!in_place_) unpack_columns(out_, p_.dim, n, wide_, turned(out), room_);
    float* lse = static_cast<float*>(args_.lse) + (b * p_.heads + h) * p_.queries + first;
    for (int64_t i = 0; i < n; ++i) {
      const double maximum = maximum_[i] * std::fabs(p_.scale);
      lse[i] = static_cast<float>(maximum + static_cast<double>(std::log(sum_[i])));
    }
  }

  // The keys from `key` on; the last of them divide c by the sum.
  void add(const Rows& q, const Rows& k, const Rows& v, int64_t n, int64_t keys, int64_t key, float* c, int64_t c_row) {
    const bool first = key == 0, last = key + keys == p_.keys;
    // Logits are [queries][keys], or [keys][queries] where there are queries enough for the lanes.
    const int64_t columns = round_up(keys_on_lanes_ ? keys : n, kTileLanes);
    bool rescale;
    if (keys_on_lanes_) {
      dots(q, n, k, keys, columns);
      rescale = kernels_.softmax({logits_, columns, n, keys, scale_, maximum_, sum_, factor_});
    } else {
      dots(k, keys, q, n, columns);
      for (int64_t j = 0; n < columns && j < keys; ++j) std::fill_n(logits_ + j * columns + n, columns - n, 0.0f);
      rescale = tiles_.softmax({logits_, nullptr, keys, columns, scale_, maximum_, sum_, factor_});
    }
    if (rescale && !first) kernels_.scale(c, c_row, n, p_.dim, factor_);
    for (int64_t i = 0; last && i < n; ++i) factor_[i] = 1.0f / sum_[i];
    const int64_t row = keys_on_lanes_ ? columns : 1, depth = keys_on_lanes_ ? 1 : columns;
    for (int64_t from = 0; from < keys; from += kMixKeys) {
      const int64_t some = std::min(kMixKeys, keys - from);
      kernels_.mix({v.dtype, logits_ + from * depth, row, depth, v.at(from), v.row, c, c_row, n, p_.dim, some,
                    /*accumulate=*/!first || from > 0, last && from + some == keys ? factor_ : nullptr});
    }
  }

  void dots(const Rows& a, int64_t rows, const Rows& b, int64_t columns, int64_t row) {
    kernels_.dots({a.dtype, a.data, a.row, b.data, b.row, logits_, row, rows, columns, p_.dim});
    if (p_.scale < 0) {  // its sign goes to the logits, its size to the softmax: both without rounding
      for (int64_t i = 0; i < rows * row; ++i) logits_[i] = -logits_[i];
    }
  }

  const AttentionArgs& args_;
  const AttentionProblem& p_;
  const AttentionTiles& tiles_ = attention_tiles();
  const RowKernels& kernels_ = tiles_.rows;
  const float scale_ = static_cast<float>(std::fabs(p_.scale) * kLog2E);
  const int64_t wide_ = round_up(p_.dim, kTileLanes);
  const bool keys_on_lanes_;
  const bool in_place_ = p_.dtype == Dtype::f32 && in_place(args_.out);  // the result is summed where it belongs
  const bool q_and_k_in_place_ = in_place(p_.q) && in_place(p_.k);       // both or none: of one dtype
  const int64_t queries_, keys_;
  float *out_, *logits_, *maximum_, *sum_, *factor_, *q_, *k_, *v_, *room_;
};

}  // namespace

bool attention_by_rows(const AttentionProblem& p) {
  constexpr int64_t kFewKeys = 8;
  // Adding up the lanes costs as much as multiplying some eight channels of each.
  const int64_t few_queries = std::clamp<int64_t>(p.dim / 8, 4, attention_tiles().rows.few_queries);
  return p.queries <= few_queries || p.keys <= kFewKeys;
}

void attention_rows(const AttentionArgs& args, int64_t begin, int64_t end) { ByRows(args).run(begin, end); }

}  // namespace dk::cpu
