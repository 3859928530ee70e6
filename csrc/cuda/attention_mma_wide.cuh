// Forward attention on tensor cores, head dims from 129 to 512: q stays in shared memory, k and v stream through it in
// panels of 64 keys x 64 channels.
//
// A block has two groups of four warps (sm_75: one, for want of shared memory), a group 32 queries. For the logits, a
// warp takes 16 queries x 32 keys of a panel; then the group exchanges maxima and probabilities, and for the product
// with v a warp takes all 32 queries x 16 channels of each panel.
#pragma once

#include "attention_mma.cuh"

namespace dk::cuda {

struct Wide {
  static constexpr int kPanel = 64, kGroupRows = 32, kGroupThreads = 128, kStages = 3;
  static constexpr int kSteps = kPanel / 16;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  static constexpr int kGroups = 1;
#else
  static constexpr int kGroups = 2;  // the host asks the kernel: it may run what was compiled for an older device
#endif
  using Panel = Tile<kPanel, kPanel / kChunk>;  // of q and the probabilities: fewer rows with one group

  static int shared(int rows, int panels) {
    return kStages * Panel::kBytes + (panels + 1) * rows * Panel::kPitch + rows * 2 * static_cast<int>(sizeof(float));
  }
};

template <class S, int kDim, bool kChannelMajor>
__global__ void __launch_bounds__(Wide::kGroups* Wide::kGroupThreads, 1)
    attention_wide_kernel(const __grid_constant__ ForwardParams p) {
  using C = Wide;
  using Panel = Wide::Panel;
  constexpr int kPanel = C::kPanel, kSteps = C::kSteps, kPanels = kDim / kPanel;
  constexpr int kThreads = C::kGroups * C::kGroupThreads, kRows = C::kGroups * C::kGroupRows;

  extern __shared__ __align__(128) unsigned char shared[];
  const int thread = static_cast<int>(threadIdx.x), lane = thread & 31, warp = thread / 32 & 3;
  const int group_row = thread / C::kGroupThreads * C::kGroupRows;
  const int row_half = warp / 2, key_half = warp % 2;  // for the logits
  const int logit_row = group_row + 16 * row_half;

  const int panels = (p.padded + kPanel - 1) / kPanel;
  constexpr uint32_t panel_bytes = kRows * Panel::kPitch;
  const uint32_t ring = shared_address(shared);
  const uint32_t q_base = ring + C::kStages * Panel::kBytes;
  const Panel weights{q_base + static_cast<uint32_t>(panels) * panel_bytes};
  const uint32_t exchange = weights.base + panel_bytes;  // float [rows][2], a column for each half of the keys
  const auto stage = [&](int i) { return Panel{ring + static_cast<uint32_t>(i) * Panel::kBytes}; };
  const auto live = [&](int panel) { return min(p.padded - panel * kPanel, kPanel); };

  const Block block(p);
  if (block.index >= p.all_heads) return;
  const int64_t first_query = int64_t{block.tile} * kRows;
  const int queries = clip(p.queries - first_query, kRows);
  const bool active = group_row < queries;
  const auto extent = [&](bool by_channel, int tokens, int live_tokens, int panel) {
    return make_extent(by_channel, tokens, live_tokens, min(p.dim - panel * kPanel, kPanel), live(panel));
  };
  const auto q_window = [&](int panel) {
    return make_window(p.q.channel_major, first_query, panel * kPanel,
                       extent(p.q.channel_major, queries, kRows, panel));
  };

  // q, by rows of queries. Where tokens are contiguous, it is turned on its way through the ring.
  const Matrix q = p.q.matrix(block.sample, block.head, p.q.channel_major);
  if (!p.q.channel_major) {
    for (int panel = 0; panel < panels; ++panel) {
      load_tile(Panel{q_base + static_cast<uint32_t>(panel) * panel_bytes}, q, q_window(panel), kThreads, thread);
    }
    commit_copies();
  } else {
    for (int first = 0; first < panels; first += C::kStages) {
      for (int i = 0; i < C::kStages && first + i < panels; ++i) {
        load_tile(stage(i), q, q_window(first + i), kThreads, thread);
      }
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      for (int i = 0; i < C::kStages && first + i < panels; ++i) {
        const Panel to{q_base + static_cast<uint32_t>(first + i) * panel_bytes};
        const Loader<Panel, Order::across, true> turned(stage(i));
        for (int step = key_half; 16 * step < live(first + i); step += 2) {
          uint32_t r[4];
          turned.load(r, 16 * step, logit_row / kChunk);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = logit_row + 8 * (e & 1) + lane / 4, column = 16 * step + 8 * (e / 2) + 2 * (lane & 3);
            store_shared(to.element(row, column), r[e]);
          }
        }
      }
      __syncthreads();
    }
  }

  // Panels arrive in the order of use: all of k, then all of v, for 64 keys after the other.
  int64_t left = block.end_key(p) - block.first_key(p);  // keys, from these on
  int64_t token = block.first_key(p);
  int next_panel = 0;
  bool next_is_v = false;
  uint32_t next_stage = ring, now = ring;
  Matrix next;
  const uint16_t* from;
  const auto turn_to = [&](const Heads& heads) {
    next = heads.matrix(block.sample, block.head, kChannelMajor);
    from = next.data + token * heads.token + copy_offset<Panel>(next, thread);
    next_panel = 0;
  };
  const auto follow = [&](uint32_t stage) {
    return stage == ring + (C::kStages - 1) * Panel::kBytes ? ring : stage + Panel::kBytes;
  };
  const auto prefetch = [&] {
    if (left > 0) {
      load_tile(Panel{next_stage}, next, from, extent(kChannelMajor, clip(left, kPanel), kPanel, next_panel), kThreads,
                thread);
      next_stage = follow(next_stage);
      from += kPanel * (kChannelMajor ? next.row : next.column);
      if (++next_panel == panels) {
        if (next_is_v) {
          token += kPanel;
          left -= kPanel;
        }
        next_is_v = !next_is_v;
        turn_to(next_is_v ? p.v : p.k);
      }
    }
    commit_copies();
  };
  const auto arrive = [&] {  // the next panel
    wait_copies<1>();
    __syncthreads();
    prefetch();
    const Panel panel{now};
    now = follow(now);
    return panel;
  };
  turn_to(p.k);
  prefetch();
  prefetch();

  // Rows group_row + 16 i + 8 half + lane / 4, as the product with v has them.
  float o[kPanels][2][2][4] = {};
  float maximum[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) maximum[i][0] = maximum[i][1] = -INFINITY;
  float sum[2] = {};  // of the rows of the logits
  const float factor = p.scaled ? p.scale : 1.0f;
  const auto exchanged = [&](int row, int half) { return exchange + static_cast<uint32_t>(row * 2 + half) * 4; };

  while (left > 0) {
    const int there = clip(left, kPanel);
    float s[4][4] = {};
    for (int panel = 0; panel < panels; ++panel) {
      const Loader<Panel, kChannelMajor ? Order::down : Order::across, kChannelMajor> k_loader(arrive());
      const Loader<Panel, Order::down, false> q_loader(Panel{q_base + static_cast<uint32_t>(panel) * panel_bytes});
      if (!active) continue;
      const auto multiply = [&](int step) {
        uint32_t a[4];
        q_loader.load(a, logit_row, 2 * step);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          uint32_t b[4];
          if constexpr (kChannelMajor) {
            k_loader.load(b, 16 * step, 4 * key_half + 2 * n);
          } else {
            k_loader.load(b, 32 * key_half + 16 * n, 2 * step);
          }
          mma<S>(s[2 * n], a, b[0], b[1]);
          mma<S>(s[2 * n + 1], a, b[2], b[3]);
        }
      };
      if (live(panel) == kPanel) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) multiply(step);
      } else {
#pragma unroll 1
        for (int step = 0; 16 * step < live(panel); ++step) multiply(step);
      }
    }

    finish_logits(p, s, there - 32 * key_half);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float seen = largest(s, half);
      if ((lane & 3) == 0) store_shared(exchanged(logit_row + 8 * half + lane / 4, key_half), seen);
    }
    __syncthreads();
    float fade[2][2], shift[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = group_row + 16 * i + 8 * half + lane / 4;
        const float seen = fmaxf(load_shared_float(exchanged(row, 0)), load_shared_float(exchanged(row, 1)));
        fade[i][half] = softmax_advance(FastPowers{}, maximum[i][half], seen * factor, shift[i][half]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mine = exponentiate(s, half, factor, row_half ? shift[1][half] : shift[0][half]);
      sum[half] = softmax_sum(FastPowers{}, sum[half], row_half ? fade[1][half] : fade[0][half], mine);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = logit_row + 8 * half + lane / 4, column = 32 * key_half + 8 * n + 2 * (lane & 3);
        store_shared(weights.element(row, column), pack<S>(s[n][2 * half], s[n][2 * half + 1]));
      }
    }
    const bool same = fade[0][0] == 1 && fade[0][1] == 1 && fade[1][0] == 1 && fade[1][1] == 1;
    if (!__all_sync(0xffffffffu, same)) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
        for (int e = 0; e < 16; ++e) o[panel][e / 8][e / 4 & 1][e & 3] *= fade[e / 8][e / 2 & 1];
      }
    }
    __syncthreads();

    uint32_t a[2][kSteps][4];
    const Loader<Panel, Order::down, false> weight_loader(weights);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) weight_loader.load(a[i][step], group_row + 16 * i, 2 * step);
    }
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel >= panels) break;
      const Loader<Panel, kChannelMajor ? Order::across : Order::down, !kChannelMajor> v_loader(arrive());
      if (!active || 16 * warp >= live(panel)) continue;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t b[4];
        if constexpr (kChannelMajor) {
          v_loader.load(b, 16 * warp, 2 * step);
        } else {
          v_loader.load(b, 16 * step, 2 * warp);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma<S>(o[panel][i][0], a[i][step], b[0], b[1]);
          mma<S>(o[panel][i][1], a[i][step], b[2], b[3]);
        }
      }
    }
  }

  const Block at(p);
  const int64_t query = int64_t{at.tile} * kRows;
  // Sums over both halves of the keys; nothing of the ring is in flight any more.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mine = row_sum(sum[half]);
    if ((lane & 3) == 0) store_shared(exchanged(logit_row + 8 * half + lane / 4, key_half), mine);
  }
  __syncthreads();
  float inverse[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group_row + 16 * i + 8 * half + lane / 4;
      const float total = load_shared_float(exchanged(row, 0)) + load_shared_float(exchanged(row, 1));
      inverse[i][half] = __frcp_rn(total);
      if (warp == 0 && (lane & 3) == 0 && row < queries) {
        store_sums(p, at, query + row, maximum[i][half], total);
      }
    }
  }
  if (p.splits > 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = group_row + 16 * i + 8 * half + lane / 4;
        float* to = partial_row(p, at, query + row);
#pragma unroll
        for (int n = 0; n < 2 * kPanels; ++n) {
          const int channel = n / 2 * kPanel + 16 * warp + 8 * (n & 1) + 2 * (lane & 3);
          const float (&pair)[4] = o[n / 2][i][n & 1];
          if (row < queries && channel < p.dim) store_pair(to + channel, pair[2 * half], pair[2 * half + 1]);
        }
      }
    }
    return;
  }
  const Matrix out = p.out.matrix(at.sample, at.head, p.out.channel_major);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
    if (panel >= panels) break;
    const Panel through = stage(panel % C::kStages);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int i = e / 4, half = e / 2 & 1, n = e & 1;
      const int row = group_row + 16 * i + 8 * half + lane / 4, column = 16 * warp + 8 * n + 2 * (lane & 3);
      const uint32_t both =
          pack<S>(o[panel][i][n][2 * half] * inverse[i][half], o[panel][i][n][2 * half + 1] * inverse[i][half]);
      if (p.out.channel_major) {
        store_shared(through.element(column, row), static_cast<uint16_t>(both));
        store_shared(through.element(column + 1, row), static_cast<uint16_t>(both >> 16));
      } else {
        store_shared(through.element(row, column), both);
      }
    }
    __syncthreads();
    const Extent e = extent(p.out.channel_major, queries, kRows, panel);
    store_tile(through, out, make_window(p.out.channel_major, query, panel * kPanel, e), kThreads, thread);
  }
}

}  // namespace dk::cuda
