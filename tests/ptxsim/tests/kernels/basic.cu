#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

// ---- elementwise, vector loads with scalar tails
__global__ void ew_f32(const float* __restrict__ x, const float* __restrict__ y, float* __restrict__ o, long long n,
                       float s) {
  long long stride = (long long)gridDim.x * blockDim.x, i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  long long n4 = n / 4;
  for (long long j = i; j < n4; j += stride) {
    float4 a = ((const float4*)x)[j], b = ((const float4*)y)[j];
    ((float4*)o)[j] = make_float4(fmaf(a.x, s, b.x), fmaf(a.y, s, b.y), fmaf(a.z, s, b.z), fmaf(a.w, s, b.w));
  }
  for (long long j = n4 * 4 + i; j < n; j += stride) o[j] = fmaf(x[j], s, y[j]);
}
__global__ void ew_f16(const __half* x, const __half* y, __half* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n / 2) {
    __half2 a = ((const __half2*)x)[i], b = ((const __half2*)y)[i];
    ((__half2*)o)[i] = __hfma2(a, b, __hadd2(a, b));
  }
  if ((n & 1) && i == 0) o[n - 1] = __hfma(x[n - 1], y[n - 1], __hadd(x[n - 1], y[n - 1]));
}
__global__ void ew_bf16(const __nv_bfloat16* x, __nv_bfloat16* o, int n) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i + 8 <= n) {
    uint4 v = *(const uint4*)(x + i);
    __nv_bfloat162* h = (__nv_bfloat162*)&v;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      float2 f = __bfloat1622float2(h[k]);
      f.x = f.x / (1.f + expf(-f.x));
      f.y = f.y / (1.f + expf(-f.y));
      h[k] = __float22bfloat162_rn(f);
    }
    *(uint4*)(o + i) = v;
  } else
    for (int k = i; k < n; k++) {
      float f = __bfloat162float(x[k]);
      o[k] = __float2bfloat16(f / (1.f + expf(-f)));
    }
}
// ---- Philox4x32-10 and Box-Muller
__device__ uint4 philox(uint4 c, uint2 k) {
#pragma unroll
  for (int r = 0; r < 10; r++) {
    uint32_t h0 = __umulhi(0xD2511F53u, c.x), l0 = 0xD2511F53u * c.x, h1 = __umulhi(0xCD9E8D57u, c.z),
             l1 = 0xCD9E8D57u * c.z;
    c = make_uint4(h1 ^ c.y ^ k.x, l1, h0 ^ c.w ^ k.y, l0);
    k.x += 0x9E3779B9u;
    k.y += 0xBB67AE85u;
  }
  return c;
}
__global__ void k_philox(uint4* o, int n, unsigned long long seed, unsigned long long off) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n)
    o[i] = philox(make_uint4((uint32_t)off, (uint32_t)(off >> 32), i, 0),
                  make_uint2((uint32_t)seed, (uint32_t)(seed >> 32)));
}
__global__ void k_boxmuller(float4* o, int n, unsigned long long seed) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  uint4 r = philox(make_uint4(i, 0, 0, 0), make_uint2((uint32_t)seed, (uint32_t)(seed >> 32)));
  float u1 = r.x * 2.3283064e-10f + 1.1641532e-10f, u2 = r.y * 2.3283064e-10f + 1.1641532e-10f;
  float u3 = r.z * 2.3283064e-10f + 1.1641532e-10f, u4 = r.w * 2.3283064e-10f + 1.1641532e-10f;
  float a = sqrtf(-2.f * logf(u1)), b = sqrtf(-2.f * __logf(u3)), s, c, s2, c2;
  sincosf(6.2831853f * u2, &s, &c);
  __sincosf(6.2831853f * u4, &s2, &c2);
  o[i] = make_float4(a * s, a * c, b * s2, b * c2);
}
// ---- reductions, scans
__global__ void blk_reduce(const float* x, float* o, int n) {
  __shared__ float s[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int k = 16; k; k >>= 1) v += __shfl_down_sync(~0u, v, k);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? s[threadIdx.x] : 0.f;
    for (int k = 16; k; k >>= 1) v += __shfl_xor_sync(~0u, v, k);
    if (threadIdx.x == 0) atomicAdd(o, v);
  }
}
__global__ void blk_scan(const int* x, int* o, int n) {  // Hillis-Steele in shared memory
  extern __shared__ int sm[];
  int t = threadIdx.x, T = blockDim.x, p = 0;
  sm[t] = t < n ? x[t] : 0;
  __syncthreads();
  for (int d = 1; d < T; d *= 2) {
    sm[(p ^ 1) * T + t] = sm[p * T + t] + (t >= d ? sm[p * T + t - d] : 0);
    p ^= 1;
    __syncthreads();
  }
  if (t < n) o[t] = sm[p * T + t];
}
__global__ void softmax_rows(const float* x, float* o, int cols) {
  __shared__ float red[32];
  const float* r = x + (size_t)blockIdx.x * cols;
  float m = -INFINITY;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) m = fmaxf(m, r[i]);
  for (int k = 16; k; k >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, k));
  if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = m;
  __syncthreads();
  m = red[0];
  for (int k = 1; k < blockDim.x / 32; k++) m = fmaxf(m, red[k]);
  __syncthreads();
  float s = 0;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) s += __expf(r[i] - m);
  for (int k = 16; k; k >>= 1) s += __shfl_xor_sync(~0u, s, k);
  if (threadIdx.x % 32 == 0) red[threadIdx.x / 32] = s;
  __syncthreads();
  s = 0;
  for (int k = 0; k < blockDim.x / 32; k++) s += red[k];
  for (int i = threadIdx.x; i < cols; i += blockDim.x)
    o[(size_t)blockIdx.x * cols + i] = __fdividef(__expf(r[i] - m), s);
}
// ---- transpose through shared memory (bank conflicts with PAD=0)
template <int PAD>
__global__ void transpose(const float* x, float* o, int n) {
  __shared__ float s[32][32 + PAD];
  int bx = blockIdx.x * 32, by = blockIdx.y * 32;
  for (int j = threadIdx.y; j < 32; j += blockDim.y)
    if (by + j < n && bx + threadIdx.x < n) s[j][threadIdx.x] = x[(by + j) * n + bx + threadIdx.x];
  __syncthreads();
  for (int j = threadIdx.y; j < 32; j += blockDim.y)
    if (bx + j < n && by + threadIdx.x < n) o[(bx + j) * n + by + threadIdx.x] = s[threadIdx.x][j];
}
template __global__ void transpose<0>(const float*, float*, int);
template __global__ void transpose<1>(const float*, float*, int);
// ---- atomics
__global__ void atomics(int* h, unsigned* u, float* f, double* d, unsigned long long* ll, __half2* h2,
                        __nv_bfloat162* b2, int n) {
  __shared__ int sh[16];
  __shared__ float sf;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 16) sh[threadIdx.x] = 0;
  if (threadIdx.x == 16) sf = 0;
  __syncthreads();
  if (i < n) {
    atomicAdd(&sh[i % 13], i);
    atomicAdd(&sf, 1.0f);
    atomicMax(&h[16], i * 7 % 1001);
    atomicMin(&h[17], -i);
    atomicXor(&h[18], i);
    atomicOr(&h[19], 1 << (i % 31));
    atomicAnd(&h[20], ~(1 << (i % 31)));
    unsigned old = atomicInc(&u[0], 36);
    atomicAdd(&u[2 + old], 1u);
    atomicDec(&u[1], 10);
    atomicAdd(f, 0.5f * (i & 3));
    atomicAdd(d, 0.1 * i);
    atomicAdd(ll, (unsigned long long)i << 33);
    atomicAdd(h2, __floats2half2_rn(1.f, 0.5f));
    atomicAdd(b2, __floats2bfloat162_rn(0.25f, 1.f));
    float* fm = f + 1;
    int* ai = (int*)fm;
    int o = *ai, a;  // CAS loop float max
    float v = (float)(i * 37 % 911);
    do {
      a = o;
      o = atomicCAS(ai, a, __float_as_int(fmaxf(v, __int_as_float(a))));
    } while (o != a);
  }
  __syncthreads();
  if (threadIdx.x < 13) atomicAdd(&h[threadIdx.x], sh[threadIdx.x]);
  if (threadIdx.x == 0) atomicAdd(f + 2, sf);
}
// ---- calls, recursion, function pointers, switch, local arrays, const, structs, printf
struct Big {
  float* p;
  int n;
  float s;
  double d[2];
  short q[3];
};
__constant__ float ctab[8] = {1, 2, 3, 4, 5, 6, 7, 8};
__device__ int gtab[4] = {10, 20, 30, 40};
__device__ float gout[64];
__noinline__ __device__ int fact(int n) { return n <= 1 ? 1 : n * fact(n - 1); }
__noinline__ __device__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
__noinline__ __device__ float local_arr(Big b, int k) {
  float t[16];
  for (int i = 0; i < 16; i++) t[i] = b.s * i + b.q[i % 3];
  t[k & 15] += 100;
  float s = 0;
  for (int i = 0; i < 16; i++) s += t[(i * k) & 15];
  return s;
}
typedef int (*fp)(int);
__device__ __noinline__ int f_dbl(int x) { return 2 * x; }
__device__ __noinline__ int f_sq(int x) { return x * x; }
__device__ __noinline__ int f_neg(int x) { return -x; }
__device__ fp ftab[3] = {f_dbl, f_sq, f_neg};
__noinline__ __device__ void byref(int* a, int* b) {
  int t = *a;
  *a = *b + 1;
  *b = t - 1;
}
__global__ void calls(Big b, int* o) {
  int i = threadIdx.x;
  o[i] = fact(i % 11);
  o[64 + i] = fib(i % 9);
  b.p[i] = local_arr(b, i) + (float)b.d[i & 1] + ctab[i & 7] + gtab[i & 3];
  o[128 + i] = ftab[i % 3](i);
  int x = i, y = 1000 + i;
  byref(&x, &y);
  o[192 + i] = x * 10000 + y;
  gout[i] = b.p[i] * 2;
}
__global__ void k_switch(int* o, const int* x, int n) {
  int i = threadIdx.x;
  int v = x[i], r = 0;
  switch (v) {
    case 0:
      r = v + 11;
      break;
    case 1:
      r = v * 7;
      break;
    case 2:
      r = v ^ 0x55;
      break;
    case 3:
      r = -v;
      break;
    case 4:
      r = v << 4;
      for (int k = 0; k < n; k++) r += k * v;
      break;
    case 5:
      r = v / 2;
      break;
    case 6:
      r = 99;
    case 7:
      r += 5;
      break;
    case 8:
      r = v % 3;
      break;
    case 9:
      r = o[i] + 1;
      break;
    case 10:
      r = v * v * v;
      break;
    case 11:
      r = 77;
      break;
    default:
      r = -1;
  }
  o[i] = r;
}
__global__ void k_brx(int* o, const int* x) {
  int v = x[threadIdx.x], r;
  asm volatile(
      "{\n\t.reg .u32 t;\n\tts: .branchtargets L0, L1, L2, L3;\n\tbrx.idx %1, ts;\n\tL0: mov.u32 t, 100; bra.uni "
      "E;\n\tL1: mov.u32 t, 200; bra.uni E;\n\tL2: add.u32 t, %1, 300; bra.uni E;\n\tL3: mov.u32 t, 400;\n\tE: mov.u32 "
      "%0, t;\n\t}"
      : "=r"(r)
      : "r"(v));
  o[threadIdx.x] = r;
}
__global__ void k_double(const double* x, double* o, float* of, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double v = x[i];
  o[i] = sqrt(v * v + 1.0) / (2.0 + cos(v)) + fma(v, v, -1.0 / 3.0);
  o[n + i] = exp(-fabs(v)) + log1p(v * v) + pow(fabs(v), 1.5);
  o[2 * n + i] = floor(v) + rint(v * 3) + trunc(v * 5) + fmin(v, 0.5) + fmod(v, 0.7) + tanh(v) + erf(v);
  of[i] = (float)v;
}
__global__ void k_int64(const long long* a, const long long* b, long long* o, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  long long x = a[i], y = b[i];
  unsigned long long ux = x, uy = y;
  o[i] = x / y;
  o[n + i] = x % y;
  o[2 * n + i] = (long long)(ux / uy);
  o[3 * n + i] = (long long)(ux % uy);
  o[4 * n + i] = __mul64hi(x, y);
  o[5 * n + i] = (long long)__umul64hi(ux, uy);
  unsigned __int128 p = (unsigned __int128)ux * uy + ((unsigned __int128)uy << 64 | ux);
  o[6 * n + i] = (long long)p;
  o[7 * n + i] = (long long)(p >> 64);
  o[8 * n + i] = (x >> (y & 63)) ^ (long long)(ux >> (y & 63)) ^ (x << (y & 63));
  o[9 * n + i] = __clzll(x) + 100 * __popcll(x) + 10000 * __ffsll(x) + (long long)(__brevll(ux) >> 20);
  o[10 * n + i] = x * y - (x < y ? x : y);
}
__global__ void k_idx3(int* o) {
  int b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int t = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  o[b * blockDim.x * blockDim.y * blockDim.z + t] = blockIdx.x * 1000000 + blockIdx.y * 100000 + blockIdx.z * 10000 +
                                                    threadIdx.x * 100 + threadIdx.y * 10 + threadIdx.z;
}
__global__ void k_printf(int n) {
  if (threadIdx.x < n)
    printf("t%d %5.2f %s %llx|%c%%\n", threadIdx.x, threadIdx.x * 1.5, "str", 0x123456789aULL + threadIdx.x,
           'a' + threadIdx.x);
}
__global__ void k_assert(int n) { assert((int)threadIdx.x < n); }
__global__ void k_trap(int n) {
  if (threadIdx.x == n) __trap();
}
template <typename T, int N>
__global__ void k_tmpl(T* o) {
  T s = 0;
  for (int i = 0; i < N; i++) s += (T)(i * 2);
  o[threadIdx.x] = s + (T)threadIdx.x;
}
template __global__ void k_tmpl<float, 3>(float*);
template __global__ void k_tmpl<int, 5>(int*);
template __global__ void k_tmpl<double, 7>(double*);
// 16-byte struct array with unaligned tail handling, volatile, char/short
__global__ void k_small(const signed char* a, const unsigned char* b, const short* c, const unsigned short* d, int* o,
                        short* os, signed char* oc, int n) {
  int i = threadIdx.x;
  if (i >= n) return;
  o[i] = a[i] * b[i] + c[i] * d[i];
  os[i] = (short)(c[i] + a[i]);
  oc[i] = (signed char)(b[i] >> 1) - a[i];
}
