// Attention, backward: dV = P^T dO, dP = dO V^T, dS = P (dP - delta), dQ = scale dS K, dK = scale dS^T Q with
// P = exp(scale Q K^T - lse), delta_i = dO_i . O_i. Five products for every tile of queries and keys, none of them
// twice.
//
// A head is cut into chunks of queries and of keys. One task is one pair of chunks, a cell: it adds to the sums of dQ
// of its queries and of dK and dV of its keys. The cells of one phase share neither, and every sum meets its cells in
// the order of the phases: no atomics, and the bits do not depend on who does what.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/softmax.h"
#include "attention_grad_f64.h"
#include "attention_pack.h"

namespace dk::cpu {
namespace {

constexpr int64_t kTile = 2 * kTileDepth;  // queries and keys of a tile: sums of whole chains
constexpr int64_t kLongestChunk = 9 * kTile, kShortestChunk = 3 * kTile;
constexpr int64_t kTasks = 8;                 // of a phase and sample: with fewer, chunks are shorter
constexpr int64_t kPacked = 512 * 3 * kTile;  // keys times channels of a chunk: bounds the scratch of a thread

// Tokens of a head in chunks of nearly equal size, multiples of a tile.
struct Cut {
  int64_t tokens, chunk, chunks;

  static int64_t parts(int64_t n, int64_t size) { return std::max<int64_t>(1, (n + size - 1) / size); }
  Cut(int64_t n, int64_t longest) : tokens(n) {
    const int64_t wanted = parts(n, longest);
    chunk = round_up(std::max<int64_t>(1, (n + wanted - 1) / wanted), kTile);
    chunks = parts(n, chunk);
  }
  int64_t begin(int64_t i) const { return i * chunk; }
  int64_t size(int64_t i) const { return std::min(chunk, tokens - i * chunk); }
};

struct Cell {
  int64_t queries, keys;                   // which chunks
  bool first_of_queries, last_of_queries;  // of all cells of these queries
  bool first_of_keys, last_of_keys;
};

// Along the axis with fewer chunks a chunk is a task; in phase s task t meets chunk (t + s) mod many of the other axis.
class Plan {
 public:
  explicit Plan(const AttentionProblem& p)
      : queries(p.queries, longest(p)),
        keys(p.keys, std::min(longest(p), std::max(kPacked / p.dim / kTile * kTile, kTile))) {}

  const Cut queries, keys;
  int64_t few() const { return std::min(queries.chunks, keys.chunks); }
  int64_t many() const { return std::max(queries.chunks, keys.chunks); }

  Cell cell(int64_t phase, int64_t task) const {
    // `other` meets the tasks other, other - 1 ... 0, then few() - 1 ... other + 1, as far as they exist.
    const int64_t other = (task + phase) % many();
    const bool first = phase == 0, last = phase == many() - 1;
    const bool other_first = task == std::min(other, few() - 1),
               other_last = task == (other + 1 < few() ? other + 1 : 0);
    if (queries.chunks <= keys.chunks) return {task, other, first, last, other_first, other_last};
    return {other, task, other_first, other_last, first, last};
  }

 private:
  static int64_t longest(const AttentionProblem& p) {
    int64_t chunk = kLongestChunk;
    while (chunk > kShortestChunk &&
           p.heads * std::min(Cut::parts(p.queries, chunk), Cut::parts(p.keys, chunk)) < kTasks) {
      chunk -= kShortestChunk;
    }
    return chunk;
  }
};

// What a head keeps between phases, float32: dQ as rows of queries, dK and dV as tiles [channels][keys of the tile],
// and delta. With N and D rounded up to whole vectors: 4 (N_q (D + 1) + 2 N_k D) bytes.
struct Sums {
  float *dq, *dk, *dv, *delta;
  int64_t row;  // of dq

  explicit Sums(const AttentionProblem& p) : row(round_up(p.dim, kTileLanes)) {}
  void lay_out(Arena& arena, const AttentionProblem& p) {
    const int64_t queries = round_up(p.queries, kTileLanes), keys = round_up(p.keys, kTileLanes);
    dq = arena.take<float>(queries * row);
    dk = arena.take<float>(keys * p.dim);
    dv = arena.take<float>(keys * p.dim);
    delta = arena.take<float>(queries);
  }
};

int64_t sums_bytes(const AttentionProblem& p) {
  Arena count(nullptr);
  Sums(p).lay_out(count, p);
  return count.used();
}

template <class T>
constexpr int64_t kPerElement = std::is_same<T, Pair>::value ? 2 : 1;  // summed indices of an element of a product

Slice transposed(const Slice& s) { return {s.data, s.dtype, s.channel, s.token}; }

// Cells one after the other, on one thread.
template <class T>
class Backward {
 public:
  explicit Backward(const AttentionGradArgs& args)
      : args_(args), p_(args.problem), plan_(args.problem), sums_(args.problem) {
    Arena count(nullptr);
    lay_out(count);
    Arena arena(scratch(count.used()));
    lay_out(arena);
  }

  void run(int64_t phase, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      choose_head(task / plan_.few());
      run(plan_.cell(phase, task % plan_.few()));
    }
  }

 private:
  static constexpr int64_t kPer = kPerElement<T>;

  void lay_out(Arena& arena) {
    // Rows whose length is a large power of two would share few cache sets.
    key_row_ = sums_.row < 256 ? sums_.row : sums_.row + kTileLanes;
    const int64_t chunk = plan_.keys.chunk, tile = kTile * kTile;
    k_columns_ = arena.take<T>(chunk * p_.dim / kPer);
    v_columns_ = arena.take<T>(chunk * p_.dim / kPer);
    k_rows_ = arena.take<T>(chunk * key_row_ / kPer);
    for (T*& buffer : buffers_) buffer = arena.take<T>(kTile * p_.dim / kPer);
    logits_ = arena.take<float>(exact_sums_ ? kTile * chunk : tile);
    dp_ = arena.take<float>(tile);
    for (Pair*& pairs : pairs_) pairs = kPer == 2 ? arena.take<Pair>(tile / 2) : nullptr;
    offset_ = arena.take<float>(kTile);
    offset_low_ = arena.take<float>(kTile);
    room_ = arena.take<float>(kTile * sums_.row);
    dense_ = arena.take<float>(kTile * p_.dim);
  }

  void choose_head(int64_t number) {
    const int64_t b = number / p_.heads, h = number % p_.heads;
    const auto of = [&](const HeadsView& view) { return head_of(view, p_.dtype, b, h); };
    q_ = of(p_.q), k_ = of(p_.k), v_ = of(p_.v), out_ = of(args_.out), grad_ = of(args_.grad_out);
    dq_ = of(args_.dq), dk_ = of(args_.dk), dv_ = of(args_.dv);
    lse_ = static_cast<const float*>(args_.lse) + number * p_.queries;
    Arena arena(static_cast<char*>(args_.workspace) + number * sums_bytes(p_));
    sums_.lay_out(arena, p_);
  }

  void run(const Cell& cell) {
    const int64_t first_query = plan_.queries.begin(cell.queries), queries = plan_.queries.size(cell.queries);
    const int64_t first_key = plan_.keys.begin(cell.keys), keys = plan_.keys.size(cell.keys);
    pack_keys(first_key, keys);
    if (cell.first_of_keys) {
      const int64_t sums = round_up(keys, kTileLanes) * p_.dim;
      std::fill_n(sums_.dk + first_key * p_.dim, sums, 0.0f);
      std::fill_n(sums_.dv + first_key * p_.dim, sums, 0.0f);
    }
    for (int64_t i = 0; i < queries; i += kTile) {
      const int64_t query = first_query + i, n = std::min(kTile, queries - i);
      float* dq = sums_.dq + query * sums_.row;
      bring_queries(query, n, cell.first_of_queries);
      if (cell.first_of_queries) std::fill_n(dq, n * sums_.row, 0.0f);
      if (exact_sums_) refine_offsets(n, keys);
      for (int64_t j = 0; j < keys; j += kTile) {
        tile(n, j, std::min(kTile, keys - j), sums_.delta + query, dq, (first_key + j) * p_.dim);
      }
      if (cell.last_of_queries) {
        scale(dq, n * sums_.row);
        unpack_columns(dq, p_.dim, n, sums_.row, transposed(dq_.at(query, 0)), room_);
      }
    }
    for (int64_t j = 0; cell.last_of_keys && j < keys; j += kTile) {
      const int64_t key = first_key + j, n = std::min(kTile, keys - j), columns = round_up(n, kTileLanes);
      float *dk = sums_.dk + key * p_.dim, *dv = sums_.dv + key * p_.dim;
      scale(dk, columns * p_.dim);
      unpack_columns(dk, n, p_.dim, columns, dk_.at(key, 0), room_);
      unpack_columns(dv, n, p_.dim, columns, dv_.at(key, 0), room_);
    }
  }

  void scale(float* sums, int64_t n) const {
    const float factor = static_cast<float>(p_.scale);
    for (int64_t i = 0; i < n; ++i) sums[i] *= factor;
  }

  // K and V by channel, for logits and dP; K by key, for dQ.
  void pack_keys(int64_t first, int64_t keys) {
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t n = std::min(kTile, keys - j), columns = round_up(n, kTileLanes), at = j * p_.dim / kPer;
      const Slice k = k_.at(first + j, 0), v = v_.at(first + j, 0);
      T* rows = k_rows_ + j / kPer * key_row_;
      pack(k, n, p_.dim, columns, k_columns_ + at);
      pack(v, n, p_.dim, columns, v_columns_ + at);
      pack(transposed(k), p_.dim, n / kPer * kPer, key_row_, rows);
      if (n % kPer != 0) pack_last_key(k.at(n - 1, 0), rows + n / kPer * key_row_);
    }
  }

  void pack(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, float* to) {
    pack_columns(slice, tokens, channels, columns, false, to, room_);
  }
  void pack(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, Pair* to) {
    pack_columns(slice, tokens, channels, columns, false, to);
  }

  void pack_last_key(const Slice& key, T* to) {
    if constexpr (kPer == 2) {
      std::fill_n(to, key_row_, Pair{0});
      for (int64_t c = 0; c < p_.dim; ++c) {
        uint16_t bits;
        std::memcpy(&bits, key.at(0, c).data, sizeof bits);
        to[c].bits = bits;
      }
    }
  }

  void bring_queries(int64_t first, int64_t n, bool with_delta) {
    const Slice q = q_.at(first, 0), grad = dense(grad_.at(first, 0), n);
    if constexpr (kPer == 2) {
      q_channels_ = left_channel_pairs(q, n, p_.dim, buffers_[0]);
      q_tokens_ = left_token_pairs(q, n, p_.dim, buffers_[1]);
      grad_channels_ = left_channel_pairs(grad, n, p_.dim, buffers_[2]);
      grad_tokens_ = left_token_pairs(grad, n, p_.dim, buffers_[3]);
    } else {
      q_channels_ = q_tokens_ = left_floats(q, n, p_.dim, buffers_[0]);
      grad_channels_ = grad_tokens_ = left_floats(grad, n, p_.dim, buffers_[2]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const double offset = lse_[first + i] * kLog2E;
      offset_[i] = static_cast<float>(offset);
      offset_low_[i] = static_cast<float>(offset - offset_[i]);
    }
    if (with_delta) set_delta(out_.at(first, 0), grad, n, sums_.delta + first);
  }

  // grad_out may have any strides.
  Slice dense(const Slice& s, int64_t n) const {
    if (s.token == 1 || s.channel == 1) return s;
    const int64_t bytes = size_of(s.dtype);
    const Slice copy{reinterpret_cast<char*>(dense_), s.dtype, p_.dim, 1};
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < p_.dim; ++c) std::memcpy(copy.at(i, c).data, s.at(i, c).data, static_cast<size_t>(bytes));
    }
    return copy;
  }

  void set_delta(const Slice& out, const Slice& grad, int64_t n, float* delta) {
    const int64_t columns = round_up(n, kTileLanes);
    T *left = reinterpret_cast<T*>(logits_), *right = reinterpret_cast<T*>(dp_);
    std::fill_n(delta, columns, 0.0f);
    for (int64_t c = 0; c < p_.dim; c += kTile) {
      const int64_t channels = std::min(kTile, p_.dim - c);
      pack(out.at(0, c), n, channels, columns, left);
      pack(grad.at(0, c), n, channels, columns, right);
      if constexpr (kPer == 2) {
        tiles_.dot_columns_pairs(left, right, channels / kPer, columns, delta);
      } else {
        tiles_.dot_columns(left, right, channels, columns, delta);
      }
    }
  }

  void set_logits(int64_t n, int64_t j, int64_t keys, float* logits) {
    const int64_t columns = round_up(keys, kTileLanes);
    multiply({q_channels_.data, q_channels_.token, q_channels_.channel, k_columns_ + j * p_.dim / kPer, columns, logits,
              columns, n, columns, p_.dim / kPer, false});
  }

  // The stored log-sum-exp is off by up to half a unit in its last place, and P by as much: more than a softmax of few
  // keys rounds. With all keys at hand the sums of P say how much. Leaves the logits of all tiles.
  void refine_offsets(int64_t n, int64_t keys) {
    double sum[kTile] = {};
    for (int64_t j = 0; j < keys; j += kTile) {
      const int64_t m = std::min(kTile, keys - j);
      float* logits = logits_ + j * kTile;
      set_logits(n, j, m, logits);
      tiles_.weight_sums({logits, nullptr, nullptr, nullptr, nullptr, n, round_up(m, kTileLanes), scale_, offset_,
                          offset_low_, nullptr},
                         m, sum);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (sum[i] > 0.0) offset_low_[i] += static_cast<float>(std::log2(sum[i]));
    }
  }

  // The five products of n queries and keys j ... of the chunk.
  void tile(int64_t n, int64_t j, int64_t keys, float* delta, float* dq, int64_t key_sums) {
    const int64_t columns = round_up(keys, kTileLanes), dim = p_.dim, at = j * dim / kPer;
    float* logits = logits_ + (exact_sums_ ? j * kTile : 0);
    if (!exact_sums_) set_logits(n, j, keys, logits);
    multiply({grad_channels_.data, grad_channels_.token, grad_channels_.channel, v_columns_ + at, columns, dp_, columns,
              n, columns, dim / kPer, false});
    // dO . V instead of dO . O where they are the same: dQ and dK are exactly 0, as in the formula.
    for (int64_t i = 0; p_.keys == 1 && i < n; ++i) delta[i] = dp_[i * columns];
    tiles_.softmax_grad(
        {logits, dp_, pairs_[0], pairs_[1], pairs_[2], n, columns, scale_, offset_, offset_low_, delta});
    const T *weights, *ds, *ds_rows;
    if constexpr (kPer == 2) {
      weights = pairs_[0], ds = pairs_[1], ds_rows = pairs_[2];
      // Beside an odd last key stands no key: what is there may be anything.
      for (int64_t i = 0; keys % 2 != 0 && i < n; ++i) pairs_[2][(i * columns + keys) / 2].bits &= 0xffffu;
    } else {
      weights = logits, ds = ds_rows = dp_;
    }
    const int64_t queries = (n + kPer - 1) / kPer;
    multiply({grad_tokens_.data, grad_tokens_.channel, grad_tokens_.token, weights, columns, sums_.dv + key_sums,
              columns, dim, columns, queries, true});
    multiply({q_tokens_.data, q_tokens_.channel, q_tokens_.token, ds, columns, sums_.dk + key_sums, columns, dim,
              columns, queries, true});
    multiply({ds_rows, columns / kPer, 1, k_rows_ + j / kPer * key_row_, key_row_, dq, sums_.row, n, sums_.row,
              (keys + kPer - 1) / kPer, true});
  }

  void multiply(const TileProduct<T>& product) {
    if constexpr (kPer == 2) {
      tiles_.multiply_pairs(product);
    } else {
      tiles_.multiply(product);
    }
  }

  const AttentionGradArgs& args_;
  const AttentionProblem& p_;
  const AttentionTiles& tiles_ = attention_tiles();
  const Plan plan_;
  const bool exact_sums_ = kPer == 1 && plan_.keys.chunks == 1;
  const float scale_ = static_cast<float>(p_.scale * kLog2E);  // of the logits, for powers of 2
  Sums sums_;
  Slice q_, k_, v_, out_, grad_, dq_, dk_, dv_;  // of the head
  const float* lse_;
  int64_t key_row_;
  T *k_columns_, *v_columns_, *k_rows_, *buffers_[4];
  Left<T> q_channels_, q_tokens_, grad_channels_, grad_tokens_;  // pairs run along the channels, or along the tokens
  float *logits_, *dp_, *offset_, *offset_low_, *room_, *dense_;
  Pair* pairs_[3];  // P, dS, dS by rows
};

}  // namespace

int64_t attention_grad_workspace(const AttentionProblem& p) {
  return p.dtype == Dtype::f64 ? attention_grad_f64_workspace(p) : p.batch * p.heads * sums_bytes(p);
}

int64_t attention_grad_phases(const AttentionProblem& p) {
  return p.dtype == Dtype::f64 ? kGradPhasesF64 : Plan(p).many();
}

int64_t attention_grad_tasks(const AttentionProblem& p, int64_t phase) {
  return p.dtype == Dtype::f64 ? attention_grad_f64_tasks(p, phase) : p.batch * p.heads * Plan(p).few();
}

void attention_grad(const AttentionGradArgs& args, int64_t phase, int64_t begin, int64_t end) {
  const Dtype dtype = args.problem.dtype;
  if (dtype == Dtype::f64) {
    attention_grad_f64(args, phase, begin, end);
  } else if (in_pairs(dtype)) {
    Backward<Pair>(args).run(phase, begin, end);
  } else {
    Backward<float>(args).run(phase, begin, end);
  }
}

}  // namespace dk::cpu
