// Compact flash-attention forward: cp.async double buffering, ldmatrix(.trans), mma.sync m16n8k16,
// online softmax with exp2f, warp shuffles.  One CTA = 64 query rows of one head.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

template <typename T>
struct Tr;
template <>
struct Tr<__half> {
  static __device__ void mma(float* c, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static __device__ uint32_t pack(float x, float y) {
    __half2 h = __floats2half2_rn(x, y);
    return *(uint32_t*)&h;
  }
};
template <>
struct Tr<__nv_bfloat16> {
  static __device__ void mma(float* c, const uint32_t* a, const uint32_t* b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static __device__ uint32_t pack(float x, float y) {
    __nv_bfloat162 h = __floats2bfloat162_rn(x, y);
    return *(uint32_t*)&h;
  }
};
__device__ __forceinline__ uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(void* d, const void* s, bool ok) {
  int n = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sptr(d)), "l"(s), "r"(n));
}
__device__ __forceinline__ void ldm4(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(sptr(p)));
}
__device__ __forceinline__ void ldm2t(uint32_t* r, const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(sptr(p)));
}
#ifndef BUG
#define BUG 0
#endif

template <typename T, int D>
__global__ void __launch_bounds__(128) attn(const T* __restrict__ Q, const T* __restrict__ K, const T* __restrict__ V,
                                            T* __restrict__ O, int N, float scale_log2, int causal) {
  constexpr int BR = 64, BC = 64, LD = D + 8;
  extern __shared__ __align__(16) unsigned char smem[];
  T* sQ = (T*)smem;
  T* sK = sQ + BR * LD;
  T* sV = sK + 2 * BC * LD;
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int q0 = blockIdx.x * BR;
  const long long base = (long long)blockIdx.y * N * D;
  Q += base;
  K += base;
  V += base;
  O += base;
  auto load = [&](T* dst, const T* src, int row0) {
    for (int i = tid; i < 64 * (D / 8); i += 128) {
      int r = i / (D / 8), c = i % (D / 8) * 8;
      bool ok = row0 + r < N;
      cp16(dst + r * LD + c, src + (long long)(ok ? row0 + r : 0) * D + c, ok);
    }
  };
  int nblk = (N + BC - 1) / BC;
  if (causal) nblk = min(nblk, (q0 + BR + BC - 1) / BC);
  load(sQ, Q, q0);
  load(sK, K, 0);
  load(sV, V, 0);
  asm volatile("cp.async.commit_group;");
  float o[D / 8][4];
#pragma unroll
  for (int i = 0; i < D / 8; i++)
    for (int j = 0; j < 4; j++) o[i][j] = 0.f;
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f};
  for (int b = 0; b < nblk; b++) {
    int cur = b & 1;
    if (b + 1 < nblk) {
      load(sK + (cur ^ 1) * BC * LD, K, (b + 1) * BC);
      load(sV + (cur ^ 1) * BC * LD, V, (b + 1) * BC);
    }
    asm volatile("cp.async.commit_group;");
#if BUG != 1
    asm volatile("cp.async.wait_group 1;");
#endif
#if BUG != 2
    __syncthreads();
#endif
    float s[BC / 8][4];
#pragma unroll
    for (int i = 0; i < BC / 8; i++)
      for (int j = 0; j < 4; j++) s[i][j] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      uint32_t a[4];
      ldm4(a, sQ + (warp * 16 + lane % 16) * LD + k * 16 + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < BC / 16; n++) {
        uint32_t bb[4];
        ldm4(bb, sK + cur * BC * LD + (n * 16 + lane % 8 + lane / 16 * 8) * LD + k * 16 + (lane / 8 % 2) * 8);
        Tr<T>::mma(s[2 * n], a, bb);
        Tr<T>::mma(s[2 * n + 1], a, bb + 2);
      }
    }
#pragma unroll
    for (int i = 0; i < BC / 8; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int col = b * BC + i * 8 + t * 2 + (j & 1), row = q0 + warp * 16 + g + 8 * (j >> 1);
        s[i][j] = (col < N && (!causal || col <= row)) ? s[i][j] * scale_log2 : -INFINITY;
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float mx = m[h];
#pragma unroll
      for (int i = 0; i < BC / 8; i++) mx = fmaxf(mx, fmaxf(s[i][2 * h], s[i][2 * h + 1]));
      mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 1));
      mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 2));
      float mu = mx == -INFINITY ? 0.f : mx;
      float corr = exp2f(m[h] - mu);
      m[h] = mx;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < BC / 8; i++) {
        s[i][2 * h] = exp2f(s[i][2 * h] - mu);
        s[i][2 * h + 1] = exp2f(s[i][2 * h + 1] - mu);
        sum += s[i][2 * h] + s[i][2 * h + 1];
      }
      l[h] = l[h] * corr + sum;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        o[i][2 * h] *= corr;
        o[i][2 * h + 1] *= corr;
      }
    }
#pragma unroll
    for (int k = 0; k < BC / 16; k++) {
      uint32_t a[4] = {Tr<T>::pack(s[2 * k][0], s[2 * k][1]), Tr<T>::pack(s[2 * k][2], s[2 * k][3]),
                       Tr<T>::pack(s[2 * k + 1][0], s[2 * k + 1][1]), Tr<T>::pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 8; n++) {
        uint32_t bb[2];
        ldm2t(bb, sV + cur * BC * LD + (k * 16 + lane % 16) * LD + n * 8);
        Tr<T>::mma(o[n], a, bb);
      }
    }
#if BUG != 3
    __syncthreads();
#endif
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    l[h] += __shfl_xor_sync(~0u, l[h], 1);
    l[h] += __shfl_xor_sync(~0u, l[h], 2);
    int row = q0 + warp * 16 + g + 8 * h;
    if (row < N) {
      float inv = 1.f / l[h];
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        *(uint32_t*)(O + (long long)row * D + i * 8 + t * 2) = Tr<T>::pack(o[i][2 * h] * inv, o[i][2 * h + 1] * inv);
    }
  }
}
template __global__ void attn<__half, 32>(const __half*, const __half*, const __half*, __half*, int, float, int);
template __global__ void attn<__half, 64>(const __half*, const __half*, const __half*, __half*, int, float, int);
template __global__ void attn<__nv_bfloat16, 64>(const __nv_bfloat16*, const __nv_bfloat16*, const __nv_bfloat16*,
                                                 __nv_bfloat16*, int, float, int);
template __global__ void attn<__nv_bfloat16, 128>(const __nv_bfloat16*, const __nv_bfloat16*, const __nv_bfloat16*,
                                                  __nv_bfloat16*, int, float, int);
