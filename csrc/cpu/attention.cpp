// Attention, forward: a task is a tile of queries of one head; its keys come by in tiles, with the softmax kept online.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/softmax.h"
#include "attention_f64.h"
#include "attention_pack.h"
#include "attention_rows.h"

namespace dk::cpu {
namespace {

constexpr int64_t kKeyTile = 2 * kTileDepth;  // even; logits of a tile stay in the L1 cache
constexpr int64_t kGroupBytes = 512 << 10;    // of q and out of the query tiles that share a packed tile of keys
constexpr int64_t kMaxGroup = 64;

int64_t query_tiles(const AttentionProblem& p) { return (p.queries + kQueryTile - 1) / kQueryTile; }

// How many neighbouring query tiles share each packed tile of keys. Changes no bit.
int64_t group_of(const AttentionProblem& p) {
  const int64_t bytes = 2 * kQueryTile * p.dim * static_cast<int64_t>(sizeof(float));
  return std::clamp<int64_t>(kGroupBytes / bytes, 1, std::clamp<int64_t>(query_tiles(p), 1, kMaxGroup));
}

// What products of floats and of pairs differ in.
struct Floats {
  using Element = float;
  static constexpr int64_t kStep = 1;  // channels or keys of an element
  static Left<float> keys(const Slice& k, int64_t n, int64_t dim, float* copy, bool read_once) {
    if (read_once && k.dtype == Dtype::f32 && k.channel == 1) {
      return {reinterpret_cast<const float*>(k.data), k.token, k.channel};
    }
    return left_floats(k, n, dim, copy);
  }
  static constexpr auto values = keys;
  static void queries(const Slice& q, int64_t n, int64_t dim, int64_t columns, bool negate, float* tile, float* room) {
    pack_columns(q, n, dim, columns, negate, tile, room);
  }
  static constexpr auto multiply = &AttentionTiles::multiply;
  static const float* weights(const float* logits, const Pair*) { return logits; }
};

struct Pairs {
  using Element = Pair;
  static constexpr int64_t kStep = 2;
  static Left<Pair> keys(const Slice& k, int64_t n, int64_t dim, Pair* copy, bool) {
    return left_channel_pairs(k, n, dim, copy);
  }
  static Left<Pair> values(const Slice& v, int64_t n, int64_t dim, Pair* copy, bool) {
    return left_token_pairs(v, n, dim, copy);
  }
  static void queries(const Slice& q, int64_t n, int64_t dim, int64_t columns, bool negate, Pair* tile, float*) {
    pack_columns(q, n, dim, columns, negate, tile);
  }
  static constexpr auto multiply = &AttentionTiles::multiply_pairs;
  static const Pair* weights(const float*, const Pair* pairs) { return pairs; }
};

template <class P>
class Forward {
 public:
  explicit Forward(const AttentionArgs& args)
      : args_(args), p_(args.problem), group_(group_of(p_)), key_tile_(std::min(kKeyTile, round_up(p_.keys, 2))) {
    Arena count(nullptr);
    lay_out(count);
    Arena arena(scratch(count.used()));
    lay_out(arena);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t per_head = query_tiles(p_);
    for (int64_t task = begin, tiles; task < end; task += tiles) {
      const int64_t head = task / per_head, first = task % per_head;
      tiles = std::min({group_, per_head - first, end - task});
      run_head(head / p_.heads, head % p_.heads, first, tiles);
    }
  }

 private:
  using Element = typename P::Element;

  struct QueryTile {
    Element* q;  // [dim / kStep][columns]
    float* out;  // [dim][columns], before the division by `sum`
    float *maximum, *sum;
    int64_t first, count, columns;
  };

  void lay_out(Arena& arena) {
    for (int64_t i = 0; i < group_; ++i) {
      tile_[i].q = arena.take<Element>(p_.dim / P::kStep * kQueryTile);
      tile_[i].out = arena.take<float>(p_.dim * kQueryTile);
      tile_[i].maximum = arena.take<float>(kQueryTile);
      tile_[i].sum = arena.take<float>(kQueryTile);
    }
    k_ = arena.take<Element>(key_tile_ * p_.dim / P::kStep);
    v_ = arena.take<Element>(key_tile_ * p_.dim / P::kStep);
    logits_ = arena.take<float>(key_tile_ * kQueryTile);
    pairs_ = P::kStep == 2 ? arena.take<Pair>(key_tile_ / 2 * kQueryTile) : nullptr;
    factor_ = arena.take<float>(kQueryTile);
    room_ = arena.take<float>(p_.dim * kQueryTile);
  }

  void run_head(int64_t b, int64_t h, int64_t first_tile, int64_t tiles) {
    const Slice q = head_of(p_.q, p_.dtype, b, h), k = head_of(p_.k, p_.dtype, b, h);
    const Slice v = head_of(p_.v, p_.dtype, b, h), out = head_of(args_.out, p_.dtype, b, h);
    for (int64_t i = 0; i < tiles; ++i) begin(tile_[i], q, (first_tile + i) * kQueryTile);
    for (int64_t key = 0; key < p_.keys; key += key_tile_) {
      const int64_t keys = std::min(key_tile_, p_.keys - key);
      const Left<Element> left_k = P::keys(k.at(key, 0), keys, p_.dim, k_, one_tile_);
      const Left<Element> left_v = P::values(v.at(key, 0), keys, p_.dim, v_, one_tile_);
      for (int64_t i = 0; i < tiles; ++i) add(tile_[i], left_k, left_v, keys, key == 0);
    }
    float* lse = static_cast<float*>(args_.lse) + (b * p_.heads + h) * p_.queries;
    for (int64_t i = 0; i < tiles; ++i) finish(tile_[i], out, lse);
  }

  void begin(QueryTile& t, const Slice& q, int64_t first) {
    t.first = first;
    t.count = std::min(kQueryTile, p_.queries - first);
    t.columns = round_up(t.count, tiles_.lanes);
    // The sign of the scale goes to q, its size to the softmax: both without rounding.
    P::queries(q.at(first, 0), t.count, p_.dim, t.columns, p_.scale < 0, t.q, room_);
    std::fill_n(t.maximum, t.columns, std::numeric_limits<float>::lowest());
    std::fill_n(t.sum, t.columns, 0.0f);
  }

  void add(QueryTile& t, const Left<Element>& k, const Left<Element>& v, int64_t keys, bool first) {
    const int64_t n = t.columns;
    (tiles_.*
     P::multiply)({k.data, k.token, k.channel, t.q, n, logits_, n, keys, n, p_.dim / P::kStep, /*accumulate=*/false});
    const bool rescale = tiles_.softmax({logits_, pairs_, keys, n, scale_, t.maximum, t.sum, factor_});
    if (rescale && !first) tiles_.scale_columns(t.out, n, p_.dim, n, factor_);
    (tiles_.*P::multiply)({v.data, v.channel, v.token, P::weights(logits_, pairs_), n, t.out, n, p_.dim, n,
                           (keys + P::kStep - 1) / P::kStep, /*accumulate=*/!first});
  }

  void finish(QueryTile& t, const Slice& out, float* lse) {
    for (int64_t j = 0; j < t.columns; ++j) factor_[j] = 1.0f / t.sum[j];
    tiles_.scale_columns(t.out, t.columns, p_.dim, t.columns, factor_);
    unpack_columns(t.out, t.count, p_.dim, t.columns, out.at(t.first, 0), room_);
    for (int64_t j = 0; j < t.count; ++j) {
      const double maximum = t.maximum[j] * std::fabs(p_.scale);
      lse[t.first + j] = static_cast<float>(maximum + static_cast<double>(std::log(t.sum[j])));
    }
  }

  const AttentionArgs& args_;
  const AttentionProblem& p_;
  const AttentionTiles& tiles_ = attention_tiles();
  const float scale_ = static_cast<float>(std::fabs(p_.scale) * kLog2E);
  const int64_t group_, key_tile_;
  const bool one_tile_ = p_.queries <= kQueryTile;  // of queries: keys and values are read once
  QueryTile tile_[kMaxGroup];
  Element *k_, *v_;
  float *logits_, *factor_, *room_;
  Pair* pairs_;
};

}  // namespace

int64_t attention_tasks(const AttentionProblem& p) { return p.batch * p.heads * query_tiles(p); }

void attention(const AttentionArgs& args, int64_t begin, int64_t end) {
  const Dtype dtype = args.problem.dtype;
  if (dtype == Dtype::f64) {
    attention_f64(args, begin, end, kQueryTile);
  } else if (attention_by_rows(args.problem)) {
    attention_rows(args, begin, end);
  } else if (in_pairs(dtype)) {
    Forward<Pairs>(args).run(begin, end);
  } else {
    Forward<Floats>(args).run(begin, end);
  }
}

}  // namespace dk::cpu
