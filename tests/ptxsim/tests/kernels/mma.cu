#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>
__device__ __forceinline__ uint32_t sp(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
// GEMM tile C[M=64][N=64] = A[64][K] B[K][N=64] (row major), 4 warps, operands through ldmatrix
template <typename T>
__global__ void gemm(const T* A, const T* B, float* C, int K) {
  __shared__ __align__(16) T sA[64][40], sB[32][72];
  int t = threadIdx.x, w = t / 32, l = t % 32;
  float c[8][4] = {};
  for (int k0 = 0; k0 < K; k0 += 32) {
    for (int i = t; i < 64 * 4; i += 128)
      *(uint4*)&sA[i / 4][i % 4 * 8] = *(const uint4*)&A[(i / 4) * K + k0 + i % 4 * 8];
    for (int i = t; i < 32 * 8; i += 128)
      *(uint4*)&sB[i / 8][i % 8 * 8] = *(const uint4*)&B[(k0 + i / 8) * 64 + i % 8 * 8];
    __syncthreads();
    for (int k = 0; k < 32; k += 16) {
      uint32_t a[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(sp(&sA[w * 16 + l % 16][k + l / 16 * 8])));
      for (int n = 0; n < 8; n++) {
        uint32_t b[2];
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(b[0]), "=r"(b[1])
                     : "r"(sp(&sB[k + l % 16][n * 8])));
        if constexpr (sizeof(T) == 2 && std::is_same<T, __half>::value)
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
              : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
        else
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};"
              : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
    }
    __syncthreads();
  }
  for (int n = 0; n < 8; n++)
    for (int j = 0; j < 4; j++) C[(w * 16 + l / 4 + j / 2 * 8) * 64 + n * 8 + l % 4 * 2 + j % 2] = c[n][j];
}
template __global__ void gemm<__half>(const __half*, const __half*, float*, int);
template __global__ void gemm<__nv_bfloat16>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int);
// one-warp tiles; fragments gathered straight from global memory with the documented index formulas
__global__ void t_tf32(const float* A, const float* B, float* C, int rna) {  // m16n8k8
  int l = threadIdx.x, g = l / 4, q = l % 4;
  uint32_t a[4], b[2];
  float c[4] = {1.f, 2.f, 3.f, 4.f};
  float fa[4] = {A[g * 8 + q], A[(g + 8) * 8 + q], A[g * 8 + q + 4], A[(g + 8) * 8 + q + 4]},
        fb[2] = {B[q * 8 + g], B[(q + 4) * 8 + g]};
  for (int i = 0; i < 4; i++)
    if (rna)
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(a[i]) : "f"(fa[i]));
    else
      a[i] = __float_as_uint(fa[i]);
  for (int i = 0; i < 2; i++)
    if (rna)
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(b[i]) : "f"(fb[i]));
    else
      b[i] = __float_as_uint(fb[i]);
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int j = 0; j < 4; j++) C[(g + j / 2 * 8) * 8 + q * 2 + j % 2] = c[j];
}
__global__ void t_k8(const uint32_t* A, const uint16_t* B, float* C, int bf) {  // m16n8k8 f16/bf16, A row major pairs
  int l = threadIdx.x, g = l / 4, q = l % 4;
  float c[4] = {};
  uint32_t a0 = A[g * 4 + q], a1 = A[(g + 8) * 4 + q], b = B[(2 * q) * 8 + g] | (uint32_t)B[(2 * q + 1) * 8 + g] << 16;
  if (bf)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
  else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(b));
  for (int j = 0; j < 4; j++) C[(g + j / 2 * 8) * 8 + q * 2 + j % 2] = c[j];
}
__global__ void t_h(const uint32_t* A, const uint16_t* B, uint32_t* C) {  // m16n8k16, f16 accumulators
  int l = threadIdx.x, g = l / 4, q = l % 4;
  uint32_t a[4] = {A[g * 8 + q], A[(g + 8) * 8 + q], A[g * 8 + q + 4], A[(g + 8) * 8 + q + 4]}, b[2],
           c[2] = {0x3c003c00u, 0x40004000u};
  for (int i = 0; i < 2; i++) b[i] = B[(2 * q + 8 * i) * 8 + g] | (uint32_t)B[(2 * q + 8 * i + 1) * 8 + g] << 16;
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
               : "+r"(c[0]), "+r"(c[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  C[g * 4 + q] = c[0];
  C[(g + 8) * 4 + q] = c[1];
}
__global__ void t_s8(const uint32_t* A, const uint8_t* B, int* C) {  // m16n8k32 s8
  int l = threadIdx.x, g = l / 4, q = l % 4;
  int c[4] = {5, 6, 7, 8};
  uint32_t a[4] = {A[g * 8 + q], A[(g + 8) * 8 + q], A[g * 8 + q + 4], A[(g + 8) * 8 + q + 4]}, b[2] = {0, 0};
  for (int i = 0; i < 2; i++)
    for (int k = 0; k < 4; k++) b[i] |= (uint32_t)B[(q * 4 + k + 16 * i) * 8 + g] << (8 * k);
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  for (int j = 0; j < 4; j++) C[(g + j / 2 * 8) * 8 + q * 2 + j % 2] = c[j];
}
__global__ void t_f64(const double* A, const double* B, double* C) {  // m8n8k4
  int l = threadIdx.x, g = l / 4, q = l % 4;
  double c[2] = {1, 2};
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(A[g * 4 + q]), "d"(B[q * 8 + g]));
  C[g * 8 + q * 2] = c[0];
  C[g * 8 + q * 2 + 1] = c[1];
}
// ldmatrix every variant: out[lane][reg]
__global__ void t_ldm(const uint16_t* x, uint32_t* o) {
  __shared__ __align__(16) uint16_t s[32][8];
  int l = threadIdx.x;
  for (int k = 0; k < 8; k++) s[l][k] = x[l * 8 + k];
  __syncwarp();
  uint32_t r[14];
  uint32_t p = sp(&s[l][0]), p1 = sp(&s[l % 8][0]), p2 = sp(&s[l % 16][0]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[4]), "=r"(r[5]), "=r"(r[6]), "=r"(r[7])
               : "r"(p));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[8]), "=r"(r[9]) : "r"(p2));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[10]), "=r"(r[11]) : "r"(p2));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[12]) : "r"(p1));
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r[13]) : "r"(r[12]));
  for (int i = 0; i < 14; i++) o[l * 14 + i] = r[i];
}
#if __CUDA_ARCH__ >= 900 || defined(SM90)
__global__ void t_stm(const uint32_t* x, uint16_t* o) {
  __shared__ __align__(16) uint16_t s[64][8];
  int l = threadIdx.x;
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = x[l * 4 + i];
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(sp(&s[l][0])), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3]));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(sp(&s[32 + l][0])),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]));
  __syncwarp();
  for (int k = 0; k < 16; k++) o[l * 16 + k] = s[l * 2 + k / 8][k % 8];
  unsigned pr;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p;}" : "=r"(pr));
  o[512 + l] = pr;
}
__global__ void t_atomvec(float* f, float4 v) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(f), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
  float a, b;
  asm volatile("atom.global.v2.f32.add {%0,%1}, [%2], {%3,%4};"
               : "=f"(a), "=f"(b)
               : "l"(f + 4), "f"(1.f), "f"(2.f)
               : "memory");
  f[8 + 2 * threadIdx.x] = a;
  f[9 + 2 * threadIdx.x] = b;
}
#endif
__global__ void t_mma_partial(float* C) {  // bug: mma under a divergent branch
  float c[4] = {};
  if (threadIdx.x < 16)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(1), "r"(2), "r"(3), "r"(4), "r"(5), "r"(6));
  C[threadIdx.x] = c[0];
}
__global__ void t_ldm_misal(uint32_t* o) {
  __shared__ __align__(16) uint16_t s[400];
  for (int i = threadIdx.x; i < 400; i += 32) s[i] = i;
  __syncwarp();
  uint32_t r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(sp(&s[threadIdx.x % 8 * 12])));
  o[threadIdx.x] = r;
}

#include <mma.h>
using namespace nvcuda;
template <typename TA, typename TC, int M, int N, int K, typename LA, typename LB, typename FA = TA>
__global__ void t_wmma(const TA* A, const TA* B, const TC* C, TC* D, int kk, float s) {
  __shared__ __align__(32) TC sc[M * N];
  wmma::fragment<wmma::matrix_a, M, N, K, FA, LA> a;
  wmma::fragment<wmma::matrix_b, M, N, K, FA, LB> b;
  wmma::fragment<wmma::accumulator, M, N, K, TC> c;
  wmma::load_matrix_sync(c, C, N, wmma::mem_row_major);
  bool ra = std::is_same<LA, wmma::row_major>::value, rb = std::is_same<LB, wmma::row_major>::value;
  for (int k = 0; k < kk; k += K) {
    wmma::load_matrix_sync(a, ra ? A + k : A + k * M, ra ? kk : M);
    wmma::load_matrix_sync(b, rb ? B + k * N : B + k, rb ? N : kk);
    wmma::mma_sync(c, a, b, c);
  }
  for (int i = 0; i < c.num_elements; i++) c.x[i] = c.x[i] * (TC)s;
  wmma::store_matrix_sync(sc, c, M, wmma::mem_col_major);
  __syncwarp();
  for (int i = threadIdx.x; i < M * N; i += 32) D[i] = sc[i];
}
template __global__ void t_wmma<__half, float, 16, 16, 16, wmma::row_major, wmma::col_major>(const __half*,
                                                                                             const __half*,
                                                                                             const float*, float*, int,
                                                                                             float);
template __global__ void t_wmma<__half, __half, 32, 8, 16, wmma::col_major, wmma::row_major>(const __half*,
                                                                                             const __half*,
                                                                                             const __half*, __half*,
                                                                                             int, float);
template __global__ void t_wmma<__nv_bfloat16, float, 8, 32, 16, wmma::row_major, wmma::row_major>(const __nv_bfloat16*,
                                                                                                   const __nv_bfloat16*,
                                                                                                   const float*, float*,
                                                                                                   int, float);
template __global__ void t_wmma<float, float, 16, 16, 8, wmma::row_major, wmma::row_major, wmma::precision::tf32>(
    const float*, const float*, const float*, float*, int, float);
template __global__ void t_wmma<signed char, int, 16, 16, 16, wmma::row_major, wmma::col_major>(const signed char*,
                                                                                                const signed char*,
                                                                                                const int*, int*, int,
                                                                                                float);
