// Forward attention on tensor cores, head dims to 128: a block has 128 queries, each of its four warps 32 of them with
// all their channels.
#pragma once

#include "attention_mma.cuh"

namespace dk::cuda {

// kDim: the head dim, rounded up to a class; a head of kDim - 16 channels or fewer leaves out the last step of 16.
template <int kDim>
struct Narrow {
  static constexpr int kRows = 128, kThreads = 128, kWarpRows = 32, kSteps = kDim / 16;
  static constexpr int kKeys = kDim <= 64 ? 64 : 32;
  static constexpr bool kKeepsQ = kDim <= 64;  // in registers, over all keys
  static constexpr int kQBytes = kRows * kDim * 2, kKeyBytes = kKeys * kDim * 2;
  static constexpr int kShared = kQBytes + 4 * kKeyBytes;  // two stages of k and v
  static_assert(kShared <= 64 * 1024, "what sm_75 has");
};

template <class S, int kDim, bool kChannelMajor>
__global__ void __launch_bounds__(128, 2) attention_narrow_kernel(const __grid_constant__ ForwardParams p) {
  using C = Narrow<kDim>;
  constexpr int kRows = C::kRows, kThreads = C::kThreads, kSteps = C::kSteps, kKeys = C::kKeys;
  // q and out, by rows of queries or of channels; k and v
  using ByQuery = Tile<kRows, kDim / kChunk>;
  using ByChannel = Tile<kDim, kRows / kChunk>;
  using KeyTile = std::conditional_t<kChannelMajor, Tile<kDim, kKeys / kChunk>, Tile<kKeys, kDim / kChunk>>;

  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, first_row = thread / 32 * C::kWarpRows;
  const Block block(p);
  if (block.index >= p.all_heads) return;
  const int64_t first_query = int64_t{block.tile} * kRows;
  const bool all_steps = p.padded == kDim;
  const auto steps = [&](int step) { return step < kSteps - 1 || all_steps; };

  // The next keys and how many there are from them on.
  const Matrix k = p.k.matrix(block.sample, block.head, kChannelMajor);
  const Matrix v = p.v.matrix(block.sample, block.head, kChannelMajor);
  const uint16_t* next_k = k.data + block.first_key(p) * p.k.token + copy_offset<KeyTile>(k, thread);
  const uint16_t* next_v = v.data + block.first_key(p) * p.v.token + copy_offset<KeyTile>(v, thread);
  int64_t left = block.end_key(p) - block.first_key(p);
  const auto load_keys = [&](uint32_t stage) {
    const Extent e = make_extent(kChannelMajor, clip(left, kKeys), kKeys, p.dim, p.padded);
    load_tile(KeyTile{stage}, k, next_k, e, kThreads, thread_anew());
    load_tile(KeyTile{stage + C::kKeyBytes}, v, next_v, e, kThreads, thread_anew());
    commit_copies();
    next_k += kKeys * p.k.token;
    next_v += kKeys * p.v.token;
    left -= kKeys;
  };

  const int queries = clip(p.queries - first_query, kRows);
  const Window q_window =
      make_window(p.q.channel_major, first_query, 0, make_extent(p.q.channel_major, queries, kRows, p.dim, p.padded));
  if (p.q.channel_major) {
    load_tile(ByChannel{base}, p.q.matrix(block.sample, block.head, p.q.channel_major), q_window, kThreads, thread);
  } else {
    load_tile(ByQuery{base}, p.q.matrix(block.sample, block.head, p.q.channel_major), q_window, kThreads, thread);
  }
  commit_copies();
  uint32_t stage = base + C::kQBytes, other = stage + 2 * C::kKeyBytes;
  load_keys(stage);

  // The fragments of q stay in registers, or in shared memory by rows of queries.
  const Loader<ByQuery, Order::down, false> q_loader(ByQuery{base});
  uint32_t q[2][kSteps][4];
  wait_copies<1>();
  __syncthreads();
  if (p.q.channel_major) {
    const Loader<ByChannel, Order::across, true> turned(ByChannel{base});
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (!steps(step)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) turned.load(q[i][step], 16 * step, (first_row + 16 * i) / kChunk);
    }
    if constexpr (!C::kKeepsQ) {
      __syncthreads();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (!steps(step)) continue;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int row = first_row + 16 * (e / 4) + 8 * (e & 1) + lane / 4, column = 16 * step + 8 * (e / 2 & 1);
          store_shared(ByQuery{base}.element(row, column + 2 * (lane & 3)), q[e / 4][step][e & 3]);
        }
      }
      __syncwarp();
    }
  } else if constexpr (C::kKeepsQ) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (!steps(step)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) q_loader.load(q[i][step], first_row + 16 * i, 2 * step);
    }
  }

  float o[2][kDim / 8][4] = {};
  float maximum[2][2], sum[2][2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) maximum[i][0] = maximum[i][1] = -INFINITY;
  const float factor = p.scaled ? p.scale : 1.0f;

  for (bool more = true; more;) {
    wait_copies<0>();
    __syncthreads();
    const int there = clip(left + kKeys, kKeys);
    more = left > 0;
    if (more) load_keys(other);
    if (first_row < queries) {
      const Loader<KeyTile, kChannelMajor ? Order::down : Order::across, kChannelMajor> k_loader(KeyTile{stage});
      const Loader<KeyTile, kChannelMajor ? Order::across : Order::down, !kChannelMajor> v_loader(
          KeyTile{stage + C::kKeyBytes});

      float s[2][kKeys / 8][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (!steps(step)) continue;
        if constexpr (!C::kKeepsQ) {
#pragma unroll
          for (int i = 0; i < 2; ++i) q_loader.load(q[i][step], first_row + 16 * i, 2 * step);
        }
#pragma unroll
        for (int n = 0; n < kKeys / 16; ++n) {
          uint32_t b[4];
          if constexpr (kChannelMajor) {
            k_loader.load(b, 16 * step, 2 * n);
          } else {
            k_loader.load(b, 16 * n, 2 * step);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<S>(s[i][2 * n], q[i][step], b[0], b[1]);
            mma<S>(s[i][2 * n + 1], q[i][step], b[2], b[3]);
          }
        }
      }

      uint32_t weights[2][kKeys / 16][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        finish_logits(p, s[i], there);
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float shift;
          fade[half] = softmax_advance(FastPowers{}, maximum[i][half], largest(s[i], half) * factor, shift);
          sum[i][half] = softmax_sum(FastPowers{}, sum[i][half], fade[half], exponentiate(s[i], half, factor, shift));
        }
        // Not when no maximum has changed, which is most of the time.
        if (!__all_sync(0xffffffffu, fade[0] == 1 && fade[1] == 1)) {
#pragma unroll
          for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
            for (int e = 0; e < 4; ++e) o[i][n][e] *= fade[e / 2];
          }
        }
#pragma unroll
        for (int j = 0; j < kKeys / 16; ++j) as_operand<S>(weights[i][j], s[i][2 * j], s[i][2 * j + 1]);
      }

#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (!steps(step)) continue;
          uint32_t b[4];
          if constexpr (kChannelMajor) {
            v_loader.load(b, 16 * step, 2 * j);
          } else {
            v_loader.load(b, 16 * j, 2 * step);
          }
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma<S>(o[i][2 * step], weights[i][j], b[0], b[1]);
            mma<S>(o[i][2 * step + 1], weights[i][j], b[2], b[3]);
          }
        }
      }
    }
    const uint32_t done = stage;
    stage = other;
    other = done;
  }

  const Block at(p);
  const int64_t query = int64_t{at.tile} * kRows;
  __syncthreads();  // q is read no more: out goes through its place
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + 16 * i + 8 * half + lane / 4;
      const float total = row_sum(sum[i][half]), inverse = __frcp_rn(total);
      if ((lane & 3) == 0 && row < queries) store_sums(p, at, query + row, maximum[i][half], total);
      if (p.splits > 1) {
        float* to = partial_row(p, at, query + row) + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          if (row < queries && 8 * n < p.dim) store_pair(to + 8 * n, o[i][n][2 * half], o[i][n][2 * half + 1]);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          const int channel = 8 * n + 2 * (lane & 3);
          const uint32_t both = pack<S>(o[i][n][2 * half] * inverse, o[i][n][2 * half + 1] * inverse);
          if (p.out.channel_major) {
            store_shared(ByChannel{base}.element(channel, row), static_cast<uint16_t>(both));
            store_shared(ByChannel{base}.element(channel + 1, row), static_cast<uint16_t>(both >> 16));
          } else {
            store_shared(ByQuery{base}.element(row, channel), both);
          }
        }
      }
    }
  }
  if (p.splits > 1) return;
  __syncthreads();
  const Window out_window =
      make_window(p.out.channel_major, query, 0, make_extent(p.out.channel_major, queries, kRows, p.dim, p.padded));
  if (p.out.channel_major) {
    store_tile(ByChannel{base}, p.out.matrix(at.sample, at.head, p.out.channel_major), out_window, kThreads, thread);
  } else {
    store_tile(ByQuery{base}, p.out.matrix(at.sample, at.head, p.out.channel_major), out_window, kThreads, thread);
  }
}

}  // namespace dk::cuda
