// Backward attention for float16 and bfloat16 on tensor cores.
//
// One kernel in several roles. A block owns a tile of rows and runs over tiles of columns:
//   role    rows (x1, x2)         columns (y1, y2)      S = x1 y1^T, dP = x2 y2^T, then
//   dq      queries (q, grad_out) keys (k, v)           dq += dS k
//   dk, dv  keys (k, v)           queries (q, grad_out) dk += dS q, dv += P grad_out
// with P = exp2(scale log2(e) S - lse log2(e)) and dS = P (dP - delta). Nothing is summed across blocks. Sums are in
// float32; P and dS are rounded to 16 bits as factors of the last products.
//
// A warp has 16 rows. Its S and dP are in the registers in which mma wants P and dS as its left factor.
#pragma once

#include "attention_grad_launch.cuh"
#include "attention_grad_tile.cuh"

namespace dk::cuda::grad {

enum class Role { dq, dk_dv, dk, dv };

// Copies run in the background from sm_80 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kBackground = false;
#else
constexpr bool kBackground = true;
#endif

// kDim: channels that tiles have room for. Steps of 16 channels past the real dim are skipped.
template <int kDim, Role role>
struct Config {
  // The sums of a warp are for a slice of the channels. Warps with the same rows compute the same S and dP.
  static constexpr int kSlices = kDim > 256 ? 2 : 1, kSlice = kDim / kSlices;
  static constexpr int kRows = 16 * kWarps / kSlices;
  static constexpr int kColumns = kDim <= 64 ? 64 : kDim <= 128 ? 32 : 16;
  static constexpr int kBlocks = kColumns / 8;  // of 8 columns
  static constexpr int kSteps = kDim / 16, kSliceSteps = kSlice / 16;
  static constexpr bool kByQuery = role == Role::dq, kWithDp = role != Role::dv;
  static constexpr int kSums = role == Role::dk_dv ? 2 : 1;
  // The left factors of S and dP stay in registers where there is room.
  static constexpr bool kHold = kByQuery && kDim <= 128;
  static constexpr int kRowBytes = 2 * kRows * kDim * 2, kColumnBytes = 2 * kColumns * kDim * 2;
  static constexpr int kTermBytes = !kByQuery ? 2 * kColumns * static_cast<int>(sizeof(float)) : 0;
  // Pairs of column tiles: one is filled while the other is used, where copies run in the background and there is room.
  static constexpr int stages(bool background) { return background && kDim <= 256 ? 2 : 1; }
  static constexpr int kStages = stages(kBackground);
  static constexpr int shared_bytes(bool background) {
    return kRowBytes + stages(background) * (kColumnBytes + kTermBytes);
  }
};

struct Params {
  Operand x[2], y[2], out[2];  // out: dk before dv
  QueryTerms terms;
  int64_t rows, columns, run;  // run: of terms
  unsigned heads, tiles;
  int dim;
  bool stream;              // y[0] and y[1] are reached in chunks
  float log2_scale, scale;  // of logits, in base 2; of dq and dk
};

template <class S, int kDim, bool kRowsByToken, bool kColumnsByToken, Role role>
struct Block {
  using C = Config<kDim, role>;
  using XSide = Side<C::kRows, kDim, kRowsByToken>;
  using YSide = Side<C::kColumns, kDim, kColumnsByToken>;
  using X = typename XSide::T;
  using Y = typename YSide::T;

  const Params& p;
  int lane, my_rows, my_channels;  // the first ones of this warp
  X x1, x2;
  uint32_t stage_0, terms_0;      // shared memory: pairs of column tiles; QueryTerms of the columns
  const uint16_t *next1, *next2;  // this thread's first chunks of the next tile of columns
  int64_t head_terms;             // where the terms of this head begin
  uint32_t held[2][C::kHold ? C::kSteps : 1][4];
  float log2_sum[2], minus_delta[2];      // dq: of the rows lane / 4 and lane / 4 + 8 of the warp
  float sum[C::kSums][C::kSlice / 8][4];  // dk before dv

  __device__ __forceinline__ Block(const Params& params, uint32_t memory, int64_t b, int64_t h)
      : p(params),
        lane(static_cast<int>(threadIdx.x) & 31),
        my_rows(static_cast<int>(threadIdx.x) / 32 * 16 % C::kRows),
        my_channels(static_cast<int>(threadIdx.x) / 32 * 16 / C::kRows * C::kSlice),
        x1{memory},
        x2{memory + X::kBytes},
        stage_0(memory + 2 * X::kBytes),
        terms_0(stage_0 + C::kStages * 2 * Y::kBytes),
        next1(first_chunk(params.y[0].at(b, h))),
        next2(first_chunk(params.y[1].at(b, h))),
        head_terms((b * params.heads + h) * params.run) {
#pragma unroll
    for (int i = 0; i < C::kSums; ++i) {
#pragma unroll
      for (int j = 0; j < C::kSlice / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = 0.0f;
      }
    }
  }

  static __device__ __forceinline__ const uint16_t* first_chunk(const Matrix& m) {
    return m.data + copy_offset<Y>(m, static_cast<int>(threadIdx.x));
  }
  __device__ __forceinline__ Y stage(int64_t tile) const {
    return {stage_0 + static_cast<uint32_t>(tile) % C::kStages * (2 * Y::kBytes)};
  }
  __device__ __forceinline__ uint32_t stage_terms(int64_t tile) const {
    return terms_0 + static_cast<uint32_t>(tile) % C::kStages * C::kTermBytes;
  }

  // The next tile of columns; called with one tile after the other.
  __device__ __forceinline__ void fetch(int64_t tile, int64_t b, int64_t h) {
    const int64_t first = tile * C::kColumns;
    const Y at = stage(tile);
    if (p.stream && first + C::kColumns <= p.columns) {
      const int64_t row1 = p.y[0].matrix.row, row2 = p.y[1].matrix.row;
      YSide::copy(at, next1, row1, p.dim);
      YSide::copy(Y{at.base + Y::kBytes}, next2, row2, p.dim);
      next1 += YSide::advance(row1);
      next2 += YSide::advance(row2);
    } else {
      YSide::fill(at, p.y, 2, b, h, first, p.columns, p.dim);
    }
    if constexpr (!C::kByQuery) {
      constexpr int kChunks = C::kColumns / 4;  // of either array
      const int i = static_cast<int>(threadIdx.x);
      if (i < 2 * kChunks) {
        const float* const from = i < kChunks ? p.terms.log2_sum : p.terms.minus_delta;
        copy_chunk(stage_terms(tile) + static_cast<uint32_t>(16 * i),
                   reinterpret_cast<const uint16_t*>(from + head_terms + first + i % kChunks * 4), true);
      }
    }
  }

  // Once the rows are there.
  __device__ __forceinline__ void hold() {
    if constexpr (C::kHold) {
      const typename XSide::Rows left1(x1), left2(x2);
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        if (step > 0 && 16 * step >= p.dim) break;
        XSide::load(left1, held[0][step], my_rows, 16 * step);
        XSide::load(left2, held[1][step], my_rows, 16 * step);
      }
    }
  }

  // Unless dq: log2_sum (array 0) or minus_delta (array 1) of this lane's two columns of a block.
  __device__ __forceinline__ float2 column_terms(int64_t tile, int j, int array) const {
    if constexpr (C::kByQuery) return {};
    return load_shared_pair(stage_terms(tile) +
                            static_cast<uint32_t>((array * C::kColumns + 8 * j + lane % 4 * 2) * 4));
  }

  // s += x1 y1^T, dp += x2 y2^T. (Step 0, which is always there, has no branch before it: the compiler would keep the
  // initial values in registers of their own.)
  __device__ __forceinline__ void multiply_rows(Y tile, float (&s)[C::kBlocks][4], float (&dp)[C::kBlocks][4]) const {
    const typename XSide::Rows left1(x1), left2(x2);
    const typename YSide::Channels right1(tile), right2(Y{tile.base + Y::kBytes});
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      if (step > 0 && 16 * step >= p.dim) break;
      uint32_t a1[4], a2[4], r[4];
      if constexpr (C::kHold) {
#pragma unroll
        for (int e = 0; e < 4; ++e) a1[e] = held[0][step][e], a2[e] = held[1][step][e];
      } else {
        XSide::load(left1, a1, my_rows, 16 * step);
        if constexpr (C::kWithDp) XSide::load(left2, a2, my_rows, 16 * step);
      }
#pragma unroll
      for (int j = 0; j < C::kBlocks; j += 2) {
        YSide::load(right1, r, 8 * j, 16 * step);
        mma<S>(s[j], a1, r[0], r[1]);
        mma<S>(s[j + 1], a1, r[2], r[3]);
        if constexpr (C::kWithDp) {
          YSide::load(right2, r, 8 * j, 16 * step);
          mma<S>(dp[j], a2, r[0], r[1]);
          mma<S>(dp[j + 1], a2, r[2], r[3]);
        }
      }
    }
  }

  // sum[i] += factor[i] y[i], where y is y1, y2, or the one of `tile`.
  __device__ __forceinline__ void add_products(Y tile, const uint32_t (&factor)[C::kSums][C::kBlocks / 2][4]) {
    const Y mine = YSide::from_channel(tile, my_channels);
    const typename YSide::Tokens right[2] = {typename YSide::Tokens(mine),
                                             typename YSide::Tokens(Y{mine.base + Y::kBytes})};
    const int dim = C::kSlices == 1 ? p.dim : p.dim - my_channels;
#pragma unroll
    for (int step = 0; step < C::kSliceSteps; ++step) {
      if (step > 0 && 16 * step >= dim) break;
#pragma unroll
      for (int j = 0; j < C::kBlocks / 2; ++j) {
#pragma unroll
        for (int i = 0; i < C::kSums; ++i) {
          uint32_t r[4];
          YSide::load(right[i], r, 16 * j, 16 * step);
          mma<S>(sum[i][2 * step], factor[i][j], r[0], r[1]);
          mma<S>(sum[i][2 * step + 1], factor[i][j], r[2], r[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void work(int64_t tile) {
    const Y y = stage(tile);
    float s[C::kBlocks][4], ds[C::kBlocks][4];
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      const float2 columns = column_terms(tile, j, 1);
      ds[j][0] = C::kByQuery ? minus_delta[0] : columns.x;
      ds[j][1] = C::kByQuery ? minus_delta[0] : columns.y;
      ds[j][2] = C::kByQuery ? minus_delta[1] : columns.x;
      ds[j][3] = C::kByQuery ? minus_delta[1] : columns.y;
      s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
    }
    multiply_rows(y, s, ds);
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      const float2 columns = column_terms(tile, j, 0);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float subtract = C::kByQuery ? log2_sum[e / 2] : e % 2 == 0 ? columns.x : columns.y;
        s[j][e] = exp2_fast(__fmaf_rn(s[j][e], p.log2_scale, -subtract));
        ds[j][e] = __fmul_rn(s[j][e], ds[j][e]);
      }
    }
    const int64_t left = p.columns - tile * C::kColumns;
    if (left < C::kColumns) {  // columns that are not there give nothing, not even NaN
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (8 * j + lane % 4 * 2 + e % 2 >= static_cast<int>(left)) s[j][e] = ds[j][e] = 0.0f;
        }
      }
    }
    uint32_t factor[C::kSums][C::kBlocks / 2][4];
#pragma unroll
    for (int j = 0; j < C::kBlocks / 2; ++j) {
      if constexpr (C::kWithDp) as_operand<S>(factor[0][j], ds[2 * j], ds[2 * j + 1]);
      if constexpr (role != Role::dq && role != Role::dk)
        as_operand<S>(factor[C::kSums - 1][j], s[2 * j], s[2 * j + 1]);
    }
    add_products(C::kWithDp ? y : Y{y.base + Y::kBytes}, factor);
  }
};

template <class S, int kDim, bool kRowsByToken, bool kColumnsByToken, Role role>
__global__ void __launch_bounds__(kThreads, kDim > 128 ? 1 : 2) kernel(const __grid_constant__ Params p) {
#if __CUDA_ARCH__ < 800
  constexpr bool kThere = std::is_same_v<S, Half> && kDim <= 128;
#else
  constexpr bool kThere = true;
#endif
  if constexpr (kThere) {
    using B = Block<S, kDim, kRowsByToken, kColumnsByToken, role>;
    using C = typename B::C;
    extern __shared__ __align__(128) char memory[];
    const unsigned bh = blockIdx.x / p.tiles;
    const int64_t first = int64_t{C::kRows} * (blockIdx.x % p.tiles), b = bh / p.heads, h = bh % p.heads;
    const int64_t count = (p.columns + C::kColumns - 1) / C::kColumns;

    B me(p, shared_address(memory), b, h);
    if (p.dim % 16 != 0) {  // the stream leaves these alone
#pragma unroll
      for (int i = 0; i < C::kStages; ++i) B::YSide::clear_half_step(me.stage(i), p.dim);
      __syncthreads();
    }
    B::XSide::fill(me.x1, p.x, C::kWithDp ? 2 : 1, b, h, first, p.rows, p.dim);
    if constexpr (C::kByQuery) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = me.head_terms + first + me.my_rows + me.lane / 4 + 8 * i;
        me.log2_sum[i] = p.terms.log2_sum[at];
        me.minus_delta[i] = p.terms.minus_delta[at];
      }
    }

    if constexpr (C::kStages == 1) {
      for (int64_t tile = 0; tile < count; ++tile) {
        if (tile > 0) __syncthreads();
        me.fetch(tile, b, h);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        if (tile == 0) me.hold();
        me.work(tile);
      }
    } else {
      // Copies are one tile ahead of the work. One barrier says both that a tile has come and that nobody needs the one
      // before it any more.
      for (int64_t next = 0; next <= count; ++next) {
        if (next > 0) {
          wait_copies<0>();
          __syncthreads();
        }
        if (next < count) me.fetch(next, b, h);
        commit_copies();
        if (next == 1) me.hold();
        if (next > 0) me.work(next - 1);
      }
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();

    // Out through the tiles of the rows, which nobody needs any more.
    const auto put = [&](typename B::X tile, const float (&sum)[C::kSlice / 8][4], float factor) {
      B::XSide::template put<S>(B::XSide::from_channel(tile, me.my_channels), me.my_rows, sum, factor,
                                p.dim - me.my_channels);
    };
    put(me.x1, me.sum[0], C::kWithDp ? p.scale : 1.0f);
    if constexpr (C::kSums == 2) put(me.x2, me.sum[1], 1.0f);
    __syncthreads();
    B::XSide::store(me.x1, p.out[0].at(b, h), first, p.rows, p.dim);
    if constexpr (C::kSums == 2) B::XSide::store(me.x2, p.out[1].at(b, h), first, p.rows, p.dim);
  } else {
    __trap();  // code for sm_75 on a newer device: attention_grad_limit does not see that
  }
}

}  // namespace dk::cuda::grad
