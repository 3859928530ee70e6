#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include <cstdint>
#include <cuda/barrier>
namespace cg = cooperative_groups;
// ---- shuffles in every mode and width; inputs [n], outputs [8][n]
template <int WD>
__device__ void shf(const int* x, int* o, int d) {
  int t = threadIdx.x, n = blockDim.x, v = x[t];
  o[t] = __shfl_sync(~0u, v, d, WD);
  o[n + t] = __shfl_up_sync(~0u, v, d, WD);
  o[2 * n + t] = __shfl_down_sync(~0u, v, d, WD);
  o[3 * n + t] = __shfl_xor_sync(~0u, v, d, WD);
  o[4 * n + t] = __shfl_sync(~0u, v, v & 63, WD);
}
__global__ void k_shfl(const int* x, int* o, int d, int w) {
  if (w == 32)
    shf<32>(x, o, d);
  else if (w == 16)
    shf<16>(x, o, d);
  else if (w == 8)
    shf<8>(x, o, d);
  else
    shf<2>(x, o, d);
}
__global__ void k_shfl_pred(const int* x, int* o) {
  int t = threadIdx.x, v = x[t], r, p;
  asm volatile("{.reg .pred q; shfl.sync.down.b32 %0|q, %2, 5, 0x181f, 0xffffffff; selp.b32 %1, 1, 0, q;}"
               : "=r"(r), "=r"(p)
               : "r"(v));
  o[t] = r;
  o[blockDim.x + t] = p;
}
__global__ void k_vote(const int* x, unsigned* o) {
  int t = threadIdx.x, n = blockDim.x, v = x[t];
  o[t] = __ballot_sync(~0u, v & 1);
  o[n + t] = __any_sync(~0u, v == 3);
  o[2 * n + t] = __all_sync(~0u, v < 90);
  o[3 * n + t] = __match_any_sync(~0u, v % 5);
  int p;
  o[4 * n + t] = __match_all_sync(~0u, v / 100, &p);
  o[5 * n + t] = p;
  o[6 * n + t] = __reduce_add_sync(~0u, v);
  o[7 * n + t] = __reduce_min_sync(~0u, -v);
  o[8 * n + t] = __reduce_max_sync(~0u, (unsigned)v);
  o[9 * n + t] = __reduce_xor_sync(~0u, (unsigned)v) + __reduce_or_sync(~0u, (unsigned)v) * 256 +
                 __reduce_and_sync(~0u, (unsigned)v | 8) * 65536;
  unsigned a, b, c;
  asm volatile("mov.u32 %0, %%lanemask_lt; mov.u32 %1, %%lanemask_ge; mov.u32 %2, %%laneid;"
               : "=r"(a), "=r"(b), "=r"(c));
  o[10 * n + t] = a ^ b ^ c;
  if (v & 1)
    o[11 * n + t] = __activemask();
  else
    o[11 * n + t] = __activemask() | 0;
  if (v % 3 == 0) {
    unsigned m = __ballot_sync(__activemask(), v % 2);
    o[12 * n + t] = m;
  } else
    o[12 * n + t] = 0;
  auto tl = cg::tiled_partition<8>(cg::this_thread_block());
  o[13 * n + t] = tl.shfl_xor(v, 3) + tl.any(v == 7) * 1000 + tl.thread_rank() * 10000;
}
// partial mask sync: two halves of the warp shuffle independently inside a branch
__global__ void k_halves(int* o) {
  int t = threadIdx.x;
  int v = t * 3;
  if (t % 32 < 16) {
    for (int k = 8; k; k >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, k);
  } else {
    v = -v;
    for (int k = 8; k; k >>= 1) v += __shfl_xor_sync(0xffff0000u, v, k);
  }
  __syncwarp();
  o[t] = v;
}
// ---- divergence
__global__ void k_diverge(int* o, const int* x) {
  int t = threadIdx.x, v = x[t], s = 0;
  for (int i = 0; i < v; i++) {
    if ((i ^ t) & 1)
      s += i;
    else {
      s -= 1;
      if (s < -20) break;
    }
    while (s > 1000) s /= 3;
  }
  s = __shfl_xor_sync(~0u, s, 1);
  o[t] = s;
}
__global__ void k_spin(int* lock, int* cnt) {  // one lock per block, all threads of a warp contend
  bool done = false;
  while (!done) {
    if (atomicCAS(lock, 0, 1) == 0) {
      *(volatile int*)cnt += 1;
      __threadfence();
      atomicExch(lock, 0);
      done = true;
    }
  }
}
__global__ void k_grid_wait(volatile int* flag, int* o) {  // CTA 0 waits for CTA 1 (cooperative)
  if (blockIdx.x == 0) {
    while (*flag == 0) {
    }
    o[threadIdx.x] = *flag;
  } else if (threadIdx.x == 0)
    *flag = 42;
}
// ---- barriers
__global__ void k_named(int* o) {  // producer/consumer warps with bar.sync/bar.arrive
  __shared__ int buf[64];
  int t = threadIdx.x, w = t / 32;
  if (w < 2) {
    for (int it = 0; it < 4; it++) {
      asm volatile("bar.sync 1, 128;");
      buf[t] = it * 1000 + t;
      asm volatile("bar.arrive 2, 128;");
    }
  } else {
    for (int it = 0; it < 4; it++) {
      asm volatile("bar.arrive 1, 128;");
      asm volatile("bar.sync 2, 128;");
      o[it * 64 + t - 64] = buf[(t - 64) ^ 1];
    }
  }
}
__global__ void k_barred(const int* x, int* o) {
  int v = x[threadIdx.x];
  int c = __syncthreads_count(v > 50), a = __syncthreads_and(v < 1000), r = __syncthreads_or(v == 77);
  o[threadIdx.x] = c * 100 + a * 10 + r;
}
__global__ void k_mbar(int* o) {
  __shared__ int s[128];
#pragma nv_diag_suppress static_var_with_dynamic_init
  __shared__ cuda::barrier<cuda::thread_scope_block> bar;
  if (threadIdx.x == 0) init(&bar, blockDim.x);
  __syncthreads();
  for (int i = 0; i < 3; i++) {
    s[threadIdx.x] = threadIdx.x * (i + 1);
    bar.arrive_and_wait();
    o[i * 128 + threadIdx.x] = s[(threadIdx.x + 37) & 127];
    bar.arrive_and_wait();
  }
}
__global__ void k_early(int* o, int n) {
  __shared__ int s[64];
  if (threadIdx.x >= n) return;
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = s[n - 1 - threadIdx.x];
}
// ---- cp.async
template <int MODE>
__global__ void k_pipe(const float4* x, float4* o, int n) {  // double buffered copy * 2
  __shared__ float4 s[2][128];
  int t = threadIdx.x, nt = (n + 127) / 128;
  auto ld = [&](int b, int i) {
    int j = i * 128 + t;
    __pipeline_memcpy_async(&s[b][t], &x[j < n ? j : 0], 16, j < n ? 0 : 16);
  };
  ld(0, 0);
  __pipeline_commit();
  for (int i = 0; i < nt; i++) {
    if (i + 1 < nt) ld((i + 1) & 1, i + 1);
    __pipeline_commit();
    if (MODE == 0 || MODE == 2) __pipeline_wait_prior(1);
    if (MODE == 3) __pipeline_wait_prior(2);  // waits for too little
    if (MODE != 2) __syncthreads();
    float4 v = s[i & 1][127 - t];
    int j = i * 128 + 127 - t;
    if (j < n) o[j] = make_float4(v.x * 2, v.y * 2, v.z * 2, v.w * 2);
    __syncthreads();
  }
}
template __global__ void k_pipe<0>(const float4*, float4*, int);
template __global__ void k_pipe<1>(const float4*, float4*, int);
template __global__ void k_pipe<2>(const float4*, float4*, int);
template __global__ void k_pipe<3>(const float4*, float4*, int);
__global__ void k_cp4(const int* x, int* o) {
  __shared__ int s[256];
  int t = threadIdx.x;
  unsigned d = (unsigned)__cvta_generic_to_shared(&s[t]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(d), "l"(x + t));
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, 4;" ::"r"(
                   (unsigned)__cvta_generic_to_shared(&s[128 + (t & ~1)])),
               "l"(x + (t & ~1)));
  asm volatile("cp.async.wait_all;");
  __syncthreads();
  o[t] = s[t ^ 1];
  o[128 + t] = s[128 + (t ^ 3)];
}
// ---- planted bugs
__global__ void b_oob(float* x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) x[i] = 1.f;
}
__global__ void b_oob_ld(const float4* x, float* o) { o[threadIdx.x] = x[threadIdx.x].x; }
__global__ void b_null(int* x) { x[threadIdx.x] = 1; }
__global__ void b_misal(const float* x, float* o, int k) {
  float4 v = *(const float4*)(x + threadIdx.x * 4 + k);
  o[threadIdx.x] = v.x + v.w;
}
__global__ void b_smem_oob(int* o, int k) {
  __shared__ int s[64];
  __shared__ int s2[64];
  s[threadIdx.x] = 1;
  s2[threadIdx.x] = 2;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x + k] + s2[threadIdx.x];
}
__global__ void b_smem_dyn(int* o, int k) {
  extern __shared__ int d[];
  d[threadIdx.x + k] = 1;
  __syncthreads();
  o[threadIdx.x] = d[threadIdx.x + k];
}
__global__ void b_race(int* o) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  o[threadIdx.x] = s[threadIdx.x ^ 32];
}
__global__ void b_race_war(int* o) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  int v = s[threadIdx.x ^ 64];
  s[threadIdx.x] = v + 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void b_race_waw(int* o) {
  __shared__ int s;
  s = threadIdx.x / 32;
  __syncthreads();
  o[threadIdx.x] = s;
}
template <int SYNC>
__global__ void b_warp(int* o) {
  __shared__ int s[128];
  s[threadIdx.x] = threadIdx.x;
  if (SYNC) __syncwarp();
  o[threadIdx.x] = s[threadIdx.x ^ 1];
}
template __global__ void b_warp<0>(int*);
template __global__ void b_warp<1>(int*);
__global__ void b_uninit(int* o) {
  __shared__ int s[128];
  if (threadIdx.x != 77) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void b_bardiv(int* o) {
  __shared__ int s[64];
  if (threadIdx.x < 16) {
    s[threadIdx.x] = 1;
    __syncthreads();
    o[1] = s[0];
  } else {
    s[threadIdx.x] = 2;
    asm volatile("bar.sync 0;");
    o[2] = s[1];
  }
}
__global__ void b_barmiss(int* o) {
  if (threadIdx.x / 32 == 0) {
    asm volatile("bar.sync 1;");
  } else {
    asm volatile("bar.sync 2;");
  }
  o[threadIdx.x] = 1;
}
__global__ void b_barcount(int* o) {
  if (threadIdx.x < 32) asm volatile("bar.sync 3, 64;");
  o[threadIdx.x] = 1;
}
__global__ void b_shflmask(int* o) {
  int v = threadIdx.x;
  if (threadIdx.x < 16)
    v = __shfl_sync(~0u, v, 3);
  else {
    v += 1;
    asm volatile("bar.sync 0;");
  }
  o[threadIdx.x] = v;
}
__global__ void b_shflown(int* o) { o[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, (int)threadIdx.x, 1); }
__global__ void b_grace(int* o) { o[blockIdx.x * 127 + threadIdx.x] = 1; }
__global__ void b_grace_rw(int* o) {
  int v = o[((blockIdx.x + 1) % gridDim.x) * 128 + threadIdx.x];
  o[blockIdx.x * 128 + threadIdx.x] = v + 1;
}
__global__ void b_loop(int* o) {
  while (*(volatile int*)o == 0) {
  }
}
__global__ void b_ro(const int* x) { ((int*)x)[threadIdx.x] = 3; }
__global__ void b_local(int* o, int k) {
  int t[8];
  for (int i = 0; i < 8; i++) t[i] = o[i];
  t[k] = 5;
  int s = 0;
  for (int i = 0; i < 8; i++) s += t[(i * k) & 7];
  o[threadIdx.x] = s + t[k];
}
__global__ void b_gun(const int* x, int* o) { o[threadIdx.x] = x[threadIdx.x]; }
__global__ void b_atomrace(int* o) {
  __shared__ int s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  atomicAdd(&s, 1);
  o[threadIdx.x] = s;
}
__global__ void k_gridsync(int* o, int* p) {
  auto g = cg::this_grid();
  int r = g.thread_rank(), n = g.size();
  p[r] = r;
  g.sync();
  int v = p[n - 1 - r];
  g.sync();
  p[r] = v * 2;
  g.sync();
  o[r] = p[(r + 100) % n];
}
