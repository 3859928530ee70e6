// Bringing pieces of q, k, v and out between memory, in either axis order and any dtype, and the tiles of
// attention_tiles.h.
#pragma once

#include "../core/attention.h"
#include "attention_tiles.h"

namespace dk::cpu {

constexpr int64_t kQueryTile = 64;  // queries of a task: four vectors of AVX-512
static_assert(kQueryTile % kTileLanes == 0, "tiles have whole vectors");

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Part of one head: element (token i, channel c) is number i token + c channel, one of the two strides being 1.
struct Slice {
  char* data;
  Dtype dtype;
  int64_t token, channel;

  Slice at(int64_t i, int64_t c) const {
    return {data + (i * token + c * channel) * size_of(dtype), dtype, token, channel};
  }
};

// Do products of this dtype run on pairs? Else they run on float32.
inline bool in_pairs(Dtype dtype) { return dtype == Dtype::bf16 && attention_tiles().multiply_pairs != nullptr; }

inline Slice head_of(const HeadsView& view, Dtype dtype, int64_t b, int64_t h) {
  const int64_t offset = b * view.batch + h * view.head;
  return {static_cast<char*>(view.data) + offset * size_of(dtype), dtype, view.token, view.channel};
}

// A tile as the left operand of a product, rows as they lie in memory. A copy where query tiles share it: in memory
// rows are far apart (a stride of 4096 tokens puts all of them into one set of the cache).
template <class T>
struct Left {
  const T* data;
  int64_t token, channel;  // strides of one token and one channel; of two along the axis that pairs run along
};

// The first `tokens` x `channels` of a slice (not float64) in float32. The buffer: tokens * channels floats.
Left<float> left_floats(const Slice& slice, int64_t tokens, int64_t channels, float* buffer);

// Pairs along the channels (an even number) or the tokens (an odd last one beside zeros) of a bfloat16 slice. The
// buffer: round_up(tokens, 2) * channels / 2 pairs.
Left<Pair> left_channel_pairs(const Slice& slice, int64_t tokens, int64_t channels, Pair* buffer);
Left<Pair> left_token_pairs(const Slice& slice, int64_t tokens, int64_t channels, Pair* buffer);

// The tile [channels][columns] whose columns are the first `tokens` tokens, zeros beyond them; with `negate` its
// negative. room: tokens * channels floats of scratch.
void pack_columns(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, bool negate, float* tile,
                  float* room);
// The same in pairs along the channels: [channels / 2][columns].
void pack_columns(const Slice& slice, int64_t tokens, int64_t channels, int64_t columns, bool negate, Pair* tile);

// Writes such a tile to the first `tokens` tokens of a slice. room as above.
void unpack_columns(const float* tile, int64_t tokens, int64_t channels, int64_t columns, const Slice& slice,
                    float* room);

// At least `bytes` of memory of this thread, 64-byte aligned, kept for its next call. One user at a time.
char* scratch(int64_t bytes);

// Hands out pieces of such memory; with a null base it only counts them.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    char* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace dk::cpu
