#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#define R4(F, ...) F##_rn(__VA_ARGS__), F##_rz(__VA_ARGS__), F##_ru(__VA_ARGS__), F##_rd(__VA_ARGS__)
template <typename T>
__device__ void put4(T* o, int n, int i, T a, T b, T c, T d) {
  o[i] = a;
  o[n + i] = b;
  o[2 * n + i] = c;
  o[3 * n + i] = d;
}
__global__ void f2i(const float* x, int* si, unsigned* ui, long long* sl, unsigned long long* ul, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  put4(si, n, i, R4(__float2int, v));
  put4(ui, n, i, R4(__float2uint, v));
  put4(sl, n, i, R4(__float2ll, v));
  put4(ul, n, i, R4(__float2ull, v));
}
__global__ void d2i(const double* x, int* si, unsigned* ui, long long* sl, unsigned long long* ul, float* f, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double v = x[i];
  put4(si, n, i, R4(__double2int, v));
  put4(ui, n, i, R4(__double2uint, v));
  put4(sl, n, i, R4(__double2ll, v));
  put4(ul, n, i, R4(__double2ull, v));
  put4(f, n, i, R4(__double2float, v));
}
__global__ void i2f(const long long* x, float* a, float* b, float* c, float* d, double* e, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long v = x[i];
  put4(a, n, i, R4(__int2float, (int)v));
  put4(b, n, i, R4(__uint2float, (unsigned)v));
  put4(c, n, i, R4(__ll2float, v));
  put4(d, n, i, R4(__ull2float, (unsigned long long)v));
  put4(e, n, i, R4(__ll2double, v));
}
__global__ void arith(const float* x, const float* y, const float* z, float* ad, float* mu, float* fm, float* di,
                      float* sq, float* rc, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float a = x[i], b = y[i], c = z[i];
  put4(ad, n, i, R4(__fadd, a, b));
  put4(mu, n, i, R4(__fmul, a, b));
  put4(fm, n, i, R4(__fmaf, a, b, c));
  put4(di, n, i, R4(__fdiv, a, b));
  put4(sq, n, i, R4(__fsqrt, a));
  put4(rc, n, i, R4(__frcp, a));
}
__global__ void arith64(const double* x, const double* y, const double* z, double* ad, double* mu, double* fm,
                        double* di, double* sq, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  double a = x[i], b = y[i], c = z[i];
  put4(ad, n, i, R4(__dadd, a, b));
  put4(mu, n, i, R4(__dmul, a, b));
  put4(fm, n, i, R4(__fma, a, b, c));
  put4(di, n, i, R4(__ddiv, a, b));
  put4(sq, n, i, R4(__dsqrt, a));
}
__global__ void f2h(const float* x, __half* h, __nv_bfloat16* b, __half* h2, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  put4(h, n, i, R4(__float2half, v));
  b[i] = __float2bfloat16_rn(v);
  b[n + i] = __float2bfloat16_rz(v);
  b[2 * n + i] = __float2bfloat16_ru(v);
  b[3 * n + i] = __float2bfloat16_rd(v);
  h2[i] = __double2half((double)v * 1.0000001);
}
__global__ void hops(const __half* x, const __half* y, const __half* z, __half* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __half a = x[i], b = y[i], c = z[i];
  o[i] = __hadd(a, b);
  o[n + i] = __hsub(a, b);
  o[2 * n + i] = __hmul(a, b);
  o[3 * n + i] = __hfma(a, b, c);
  o[4 * n + i] = __hmax(a, b);
  o[5 * n + i] = __hmin_nan(a, b);
  o[6 * n + i] = __hfma_relu(a, b, c);
  o[7 * n + i] = __hadd_sat(a, b);
  o[8 * n + i] = __habs(__hneg(a));
  __half2 p = __halves2half2(a, b), q = __halves2half2(c, a);
  p = __hfma2(p, q, __hadd2(q, p));
  o[9 * n + i] = __low2half(p);
  o[10 * n + i] = __high2half(p);
  o[11 * n + i] = __int2half_rn(__half2int_rn(a) * 3);
  o[12 * n + i] = __hlt(a, b) ? __hgeu(a, c) ? a : b : c;
  o[13 * n + i] = hrint(a);
  o[14 * n + i] = htanh_approx(a);
}
__global__ void bops(const __nv_bfloat16* x, const __nv_bfloat16* y, const __nv_bfloat16* z, __nv_bfloat16* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  __nv_bfloat16 a = x[i], b = y[i], c = z[i];
  o[i] = __hadd(a, b);
  o[n + i] = __hsub(a, b);
  o[2 * n + i] = __hmul(a, b);
  o[3 * n + i] = __hfma(a, b, c);
  o[4 * n + i] = __hmax(a, b);
  o[5 * n + i] = __hmin_nan(a, b);
  __nv_bfloat162 p = __halves2bfloat162(a, b), q = __halves2bfloat162(c, a);
  p = __hfma2(p, q, __hadd2(q, p));
  o[6 * n + i] = __low2bfloat16(p);
  o[7 * n + i] = __high2bfloat16(p);
  o[8 * n + i] = __float2bfloat16(__bfloat162float(a) * 1.5f);
}
__global__ void fp8(const float2* x, unsigned short* o, float2* back, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  o[i] = __nv_cvt_float2_to_fp8x2(x[i], __NV_SATFINITE, __NV_E4M3);
  o[n + i] = __nv_cvt_float2_to_fp8x2(x[i], __NV_SATFINITE, __NV_E5M2);
  __half2_raw r = __nv_cvt_fp8x2_to_halfraw2(o[i], __NV_E4M3);
  back[i] = __half22float2(*(__half2*)&r);
  r = __nv_cvt_fp8x2_to_halfraw2(o[n + i], __NV_E5M2);
  back[n + i] = __half22float2(*(__half2*)&r);
}
__global__ void approx(const float* x, float* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i], r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[i] = r;
  asm("lg2.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[n + i] = r;
  asm("sin.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[2 * n + i] = r;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[3 * n + i] = r;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[4 * n + i] = r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[5 * n + i] = r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[6 * n + i] = r;
  asm("tanh.approx.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[7 * n + i] = r;
  asm("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(3.f));
  o[8 * n + i] = r;
  asm("div.approx.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(2e38f));
  o[9 * n + i] = r;
  asm("add.ftz.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(0.f));
  o[10 * n + i] = r;
  asm("add.sat.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(0.25f));
  o[11 * n + i] = r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(1.f));
  o[12 * n + i] = r;
  asm("max.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(-0.f));
  o[13 * n + i] = r;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(-2.f));
  o[14 * n + i] = r;
  asm("copysign.f32 %0, %1, %2;" : "=f"(r) : "f"(v), "f"(7.f));
  o[15 * n + i] = r;
  asm("cvt.rpi.f32.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[16 * n + i] = r;
  asm("cvt.sat.f32.f32 %0, %1;" : "=f"(r) : "f"(v));
  o[17 * n + i] = r;
  asm("{.reg .f32 c; mov.f32 c, 0f3F800000; slct.f32.f32 %0, c, 0f40000000, %1;}" : "=f"(r) : "f"(v));
  o[18 * n + i] = r;
  unsigned u;
  asm("set.leu.u32.f32 %0, %1, 0f3F800000;" : "=r"(u) : "f"(v));
  o[19 * n + i] = (float)u;
  asm("{.reg .pred p, q; testp.subnormal.f32 p, %1; setp.gt.or.f32 p|q, %1, 0f40A00000, p; selp.u32 %0, 1, 0, p; @q "
      "add.u32 %0, %0, 10;}"
      : "=r"(u)
      : "f"(v));
  o[20 * n + i] = (float)u;
}
// integer / bit instructions through PTX
__global__ void bits(const unsigned* x, const unsigned* y, const unsigned* z, unsigned* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned a = x[i], b = y[i], c = z[i], r;
  int k = 0;
#define P(S)                                 \
  asm(S : "=r"(r) : "r"(a), "r"(b), "r"(c)); \
  o[(k++) * n + i] = r
  P("bfe.u32 %0, %1, %2, %3;");
  P("bfe.s32 %0, %1, %2, %3;");
  P("bfi.b32 %0, %1, %3, %2, 9;");
  P("bfi.b32 %0, %1, %2, 5, %3;");
  P("prmt.b32 %0, %1, %2, %3;");
  P("prmt.b32.f4e %0, %1, %2, %3;");
  P("prmt.b32.b4e %0, %1, %2, %3;");
  P("prmt.b32.rc8 %0, %1, %2, %3;");
  P("prmt.b32.ecl %0, %1, %2, %3;");
  P("prmt.b32.ecr %0, %1, %2, %3;");
  P("prmt.b32.rc16 %0, %1, %2, %3;");
  P("shf.l.wrap.b32 %0, %1, %2, %3;");
  P("shf.r.wrap.b32 %0, %1, %2, %3;");
  P("shf.l.clamp.b32 %0, %1, %2, %3;");
  P("shf.r.clamp.b32 %0, %1, %2, %3;");
  P("lop3.b32 %0, %1, %2, %3, 0x1b;");
  P("lop3.b32 %0, %1, %2, %3, 0xe8;");
  P("shl.b32 %0, %1, %3;");
  P("shr.u32 %0, %1, %3;");
  P("shr.s32 %0, %1, %3;");
  P("popc.b32 %0, %1;");
  P("clz.b32 %0, %2;");
  P("brev.b32 %0, %1;");
  P("bfind.u32 %0, %2;");
  P("bfind.s32 %0, %1;");
  P("bfind.shiftamt.u32 %0, %2;");
  P("sad.s32 %0, %1, %2, %3;");
  P("sad.u32 %0, %1, %2, %3;");
  P("mul24.lo.s32 %0, %1, %2;");
  P("mad24.hi.u32 %0, %1, %2, %3;");
  P("dp4a.s32.u32 %0, %1, %2, %3;");
  P("dp4a.u32.u32 %0, %1, %2, %3;");
  P("dp2a.hi.s32.s32 %0, %1, %2, %3;");
  P("add.sat.s32 %0, %1, %2;");
  P("sub.sat.s32 %0, %1, %2;");
  P("mad.hi.s32 %0, %1, %2, %3;");
  P("mul.hi.u32 %0, %1, %2;");
  P("mad.hi.sat.s32 %0, %1, %2, %3;");
  P("slct.u32.s32 %0, %1, %2, %3;");
  P("cnot.b32 %0, %2;");
  P("min.s32 %0, %1, %2;");
  P("max.u32 %0, %1, %2;");
  P("abs.s32 %0, %1;");
  P("neg.s32 %0, %1;");
  P("cvt.sat.s8.s32 %0, %1;");
  P("cvt.sat.u16.s32 %0, %1;");
  P("cvt.s32.s8 %0, %1;");
  P("cvt.pack.sat.u8.s32.b32 %0, %1, %2, %3;");
  P("cvt.pack.sat.s16.s32 %0, %1, %2;");
  P("{.reg .u32 l, h; add.cc.u32 l, %1, %2; addc.u32 h, %3, 0; sub.cc.u32 l, l, %3; subc.u32 h, h, %1; xor.b32 %0, l, "
    "h;}");
  P("{.reg .u32 l, h; mad.lo.cc.u32 l, %1, %2, %3; madc.hi.u32 h, %1, %2, %3; xor.b32 %0, l, h;}");
  P("bmsk.clamp.b32 %0, %1, %3;");
  P("bmsk.wrap.b32 %0, %1, %3;");
  P("szext.clamp.s32 %0, %1, %3;");
  P("szext.wrap.u32 %0, %1, %3;");
  P("{.reg .b16 l, h; mov.b32 {l, h}, %1; mad.lo.u16 l, l, h, l; mov.b32 %0, {h, l};}");
  P("{.reg .b64 d; mov.b64 d, {%1, %2}; shr.s64 d, d, %3; cvt.u32.u64 %0, d;}");
  P("{.reg .s32 w; .reg .s16 p, q; cvt.s16.s32 p, %1; cvt.s16.s32 q, %2; mad.wide.s16 w, p, q, %3; mov.b32 %0, w;}");
}
__global__ void bits64(const unsigned long long* x, const unsigned long long* y, const unsigned* p, const unsigned* q,
                       unsigned long long* o, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned long long a = x[i], b = y[i], r;
  unsigned c = p[i], d = q[i];
  int k = 0;
#define Q(S)                                         \
  asm(S : "=l"(r) : "l"(a), "l"(b), "r"(c), "r"(d)); \
  o[(k++) * n + i] = r
  Q("bfe.u64 %0, %1, %3, %4;");
  Q("bfe.s64 %0, %1, %3, %4;");
  Q("bfi.b64 %0, %1, %2, %3, %4;");
  Q("shl.b64 %0, %1, %3;");
  Q("shr.u64 %0, %1, %3;");
  Q("shr.s64 %0, %1, %3;");
  Q("{.reg .u32 t; bfind.u64 t, %1; cvt.u64.u32 %0, t;}");
  Q("{.reg .u32 t; bfind.s64 t, %1; cvt.u64.u32 %0, t;}");
  Q("{.reg .u32 t; clz.b64 t, %2; cvt.u64.u32 %0, t;}");
  Q("min.s64 %0, %1, %2;");
  Q("max.u64 %0, %1, %2;");
  Q("mul.hi.s64 %0, %1, %2;");
  Q("mad.lo.s64 %0, %1, %2, %1;");
  Q("mul.wide.u32 %0, %3, %4;");
  Q("mul.wide.s32 %0, %3, %4;");
  Q("mad.wide.s32 %0, %3, %4, %1;");
  Q("{.reg .b64 l, h; add.cc.u64 l, %1, %2; addc.u64 h, %1, %2; xor.b64 %0, l, h;}");
  Q("{.reg .b64 l, h; sub.cc.u64 l, %1, %2; subc.u64 h, %2, %1; xor.b64 %0, l, h;}");
  Q("{.reg .b32 l, h; mov.b64 {l, h}, %1; mov.b64 %0, {h, l};}");
  Q("{.reg .b16 a, b, c, d; mov.b64 {a, b, c, d}, %1; mov.b64 %0, {d, a, c, b};}");
  Q("abs.s64 %0, %1;");
  Q("div.s64 %0, %1, 1000;");
  Q("rem.s64 %0, %1, 1000;");
  Q("{.reg .b16 a; cvt.u16.u32 a, %3; shl.b16 a, a, %4; cvt.u64.u16 %0, a;}");
  Q("{.reg .s16 a; cvt.u16.u32 a, %3; shr.s16 a, a, %4; cvt.s64.s16 %0, a;}");
  Q("{.reg .pred t; setp.lt.s64 t, %1, %2; selp.b64 %0, %1, %2, t;}");
  Q("cvt.sat.u64.s64 %0, %1;");
  Q("{.reg .s32 t; cvt.sat.s32.s64 t, %1; cvt.s64.s32 %0, t;}");
  Q("{.reg .u8 t; cvt.u8.u64 t, %1; cvt.s64.s8 %0, t;}");
  Q("mad.hi.u64 %0, %1, %2, %1;");
}
