/* Minimal stand-in for libcudart: host code compiled with "nvcc -cudart none" links against this library, and every
 * kernel launch is handed to a callback (ptxsim, see ../host.py).  Device memory is host memory between guard pages. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* `owner` is the number of the library the kernel or variable was registered by (ptxsim_set_owner before dlopen). */
typedef int (*launch_cb)(int owner, const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                         unsigned bz, void** args, uint64_t shared, int cooperative);
typedef void (*mem_cb)(void* ptr, uint64_t bytes, int alloc); /* alloc: 1 malloc, 0 free */
typedef void* (*sym_cb)(int owner, const char* name, uint64_t* bytes);
/* out: static shared bytes, local bytes per thread, largest block, bytes of shared memory a block may use */
typedef int (*attr_cb)(int owner, const char* name, int64_t* out);
static launch_cb g_launch;
static mem_cb g_mem;
static sym_cb g_sym;
static attr_cb g_attr;
static int g_owner;
void ptxsim_set_hooks(launch_cb l, mem_cb m, sym_cb s, attr_cb a) {
  g_launch = l;
  g_mem = m;
  g_sym = s;
  g_attr = a;
}
void ptxsim_set_owner(int owner) { g_owner = owner; }

static cudaError_t g_err;
static cudaError_t set(cudaError_t e) {
  if (e) g_err = e;
  return e;
}
#define OK return cudaSuccess

void ptxsim_clear_error(void) { g_err = cudaSuccess; }

/* ---- registration ---- */
typedef struct {
  const void* key;
  char* name;
  int owner;
  int dynamic;
} Ent; /* dynamic: opted-in shared bytes */
static Ent *g_fun, *g_var;
static int n_fun, n_var;
static void put(Ent** t, int* n, const void* k, const char* s) {
  Ent e = {k, strdup(s), g_owner, 48 * 1024};
  *t = realloc(*t, (*n + 1) * sizeof(Ent));
  (*t)[(*n)++] = e;
}
static Ent* get(Ent* t, int n, const void* k) {
  for (int i = n - 1; i >= 0; i--) {
    if (t[i].key == k) return &t[i];
  }
  return 0;
}
void** __cudaRegisterFatBinary(void* f) {
  void** h = malloc(sizeof(void*));
  *h = f;
  return h;
}
void __cudaRegisterFatBinaryEnd(void** h) { (void)h; }
void __cudaUnregisterFatBinary(void** h) { free(h); }
char __cudaInitModule(void** h) {
  (void)h;
  return 1;
}
void __cudaRegisterFunction(void** h, const char* hostFun, char* devFun, const char* name, int lim, void* a, void* b,
                            void* c, void* d, int* w) {
  (void)h;
  (void)devFun;
  (void)lim;
  (void)a;
  (void)b;
  (void)c;
  (void)d;
  (void)w;
  put(&g_fun, &n_fun, hostFun, name);
}
void __cudaRegisterVar(void** h, char* hostVar, char* devAddr, const char* name, int ext, size_t size, int cst,
                       int glob) {
  (void)h;
  (void)devAddr;
  (void)ext;
  (void)size;
  (void)cst;
  (void)glob;
  put(&g_var, &n_var, hostVar, name);
}

/* ---- launches ---- */
typedef struct {
  dim3 g, b;
  size_t sh;
  void* st;
} Cfg;
static __thread Cfg g_cfg[16];
static __thread int n_cfg;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t sh, struct CUstream_st* st) {
  if (n_cfg >= 16) return 1;
  Cfg c = {g, b, sh, st};
  g_cfg[n_cfg++] = c;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* sh, void* st) {
  if (!n_cfg) return cudaErrorMissingConfiguration;
  Cfg* c = &g_cfg[--n_cfg];
  *g = c->g;
  *b = c->b;
  *sh = c->sh;
  *(void**)st = c->st;
  OK;
}
static cudaError_t go(const void* f, dim3 g, dim3 b, void** args, size_t sh, int coop) {
  const Ent* k = get(g_fun, n_fun, f);
  if (!k) return set(cudaErrorInvalidDeviceFunction);
  if (!g_launch) {
    fprintf(stderr, "ptxsimrt: no launch hook installed (%s)\n", k->name);
    return set(cudaErrorNoDevice);
  }
  if (sh > (size_t)k->dynamic) return set(cudaErrorInvalidValue); /* more than 48 KiB needs the function attribute */
  return set((cudaError_t)g_launch(k->owner, k->name, g.x, g.y, g.z, b.x, b.y, b.z, args, sh, coop));
}
cudaError_t cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** args, size_t sh, cudaStream_t s) {
  (void)s;
  return go(f, g, b, args, sh, 0);
}
cudaError_t cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** args, size_t sh, cudaStream_t s) {
  (void)s;
  return go(f, g, b, args, sh, 1);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  int coop = 0;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeCooperative) coop = c->attrs[i].val.cooperative;
  return go(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, coop);
}
cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* f) {
  *k = (cudaKernel_t)f;
  OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t sh, cudaStream_t s) {
  (void)s;
  return go((const void*)k, g, b, args, sh, 0);
}
cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t sh, cudaStream_t s) {
  (void)s;
  return go((const void*)k, g, b, args, sh, 0);
}

/* ---- memory ---- */
#define GUARD (1ull << 24)
typedef struct {
  char *p, *map;
  size_t n, len;
} Blk;
static Blk* g_blk;
static int n_blk;
cudaError_t cudaMalloc(void** p, size_t n) {
  size_t body = (n + 4095) / 4096 * 4096, len = body + 2 * GUARD;
  char* m = mmap(0, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED || (body && mprotect(m + GUARD, body, PROT_READ | PROT_WRITE)))
    return set(cudaErrorMemoryAllocation);
  Blk b = {m + GUARD, m, n, len};
  g_blk = realloc(g_blk, (n_blk + 1) * sizeof(Blk));
  g_blk[n_blk++] = b;
  *p = b.p;
  if (g_mem && n) g_mem(b.p, n, 1);
  OK;
}
cudaError_t cudaFree(void* p) {
  if (!p) OK;
  for (int i = 0; i < n_blk; i++)
    if (g_blk[i].p == p) {
      if (g_mem && g_blk[i].n) g_mem(p, g_blk[i].n, 0);
      munmap(g_blk[i].map, g_blk[i].len);
      g_blk[i] = g_blk[--n_blk];
      OK;
    }
  return set(cudaErrorInvalidValue);
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t s) {
  (void)s;
  return cudaMalloc(p, n);
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t s) {
  (void)s;
  return cudaFree(p);
}
cudaError_t cudaMallocManaged(void** p, size_t n, unsigned f) {
  (void)f;
  return cudaMalloc(p, n);
}
cudaError_t cudaMallocHost(void** p, size_t n) { return cudaMalloc(p, n); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned f) {
  (void)f;
  return cudaMalloc(p, n);
}
cudaError_t cudaFreeHost(void* p) { return cudaFree(p); }
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) {
  (void)k;
  memmove(d, s, n);
  OK;
}
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  (void)t;
  return cudaMemcpy(d, s, n, k);
}
cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k) {
  for (size_t i = 0; i < h; i++) cudaMemcpy((char*)d + i * dp, (const char*)s + i * sp, w, k);
  OK;
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k,
                              cudaStream_t t) {
  (void)t;
  return cudaMemcpy2D(d, dp, s, sp, w, h, k);
}
cudaError_t cudaMemset(void* d, int v, size_t n) {
  memset(d, v, n);
  OK;
}
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t s) {
  (void)s;
  return cudaMemset(d, v, n);
}
static char* sym(const void* s) {
  const Ent* k = get(g_var, n_var, s);
  uint64_t b;
  return k && g_sym ? g_sym(k->owner, k->name, &b) : 0;
}
cudaError_t cudaGetSymbolAddress(void** p, const void* s) {
  *p = sym(s);
  return *p ? cudaSuccess : set(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* s, const void* src, size_t n, size_t o, enum cudaMemcpyKind k) {
  char* p = sym(s);
  (void)k;
  if (!p) return set(cudaErrorInvalidSymbol);
  memcpy(p + o, src, n);
  OK;
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void* s, size_t n, size_t o, enum cudaMemcpyKind k) {
  char* p = sym(s);
  (void)k;
  if (!p) return set(cudaErrorInvalidSymbol);
  memcpy(d, p + o, n);
  OK;
}
cudaError_t cudaMemcpyToSymbolAsync(const void* s, const void* src, size_t n, size_t o, enum cudaMemcpyKind k,
                                    cudaStream_t t) {
  (void)t;
  return cudaMemcpyToSymbol(s, src, n, o, k);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* d, const void* s, size_t n, size_t o, enum cudaMemcpyKind k,
                                      cudaStream_t t) {
  (void)t;
  return cudaMemcpyFromSymbol(d, s, n, o, k);
}
cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *f = *t = 80ull << 30;
  OK;
}

/* ---- streams, events, queries ---- */
cudaError_t cudaDeviceSynchronize(void) { OK; }
cudaError_t cudaDeviceReset(void) { OK; }
cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = (cudaStream_t)1;
  OK;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) {
  (void)f;
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) {
  (void)f;
  (void)p;
  return cudaStreamCreate(s);
}
cudaError_t cudaStreamDestroy(cudaStream_t s) {
  (void)s;
  OK;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  (void)s;
  OK;
}
cudaError_t cudaStreamQuery(cudaStream_t s) {
  (void)s;
  OK;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned f) {
  (void)s;
  (void)e;
  (void)f;
  OK;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* c) {
  (void)s;
  *c = cudaStreamCaptureStatusNone;
  OK;
}
cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = (cudaEvent_t)1;
  OK;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  (void)f;
  return cudaEventCreate(e);
}
cudaError_t cudaEventDestroy(cudaEvent_t e) {
  (void)e;
  OK;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  (void)e;
  (void)s;
  OK;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  (void)e;
  OK;
}
cudaError_t cudaEventQuery(cudaEvent_t e) {
  (void)e;
  OK;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  (void)a;
  (void)b;
  *ms = 1.f;
  OK;
}
cudaError_t cudaGetLastError(void) {
  cudaError_t e = g_err;
  g_err = cudaSuccess;
  return e;
}
cudaError_t cudaPeekAtLastError(void) { return g_err; }
const char* cudaGetErrorString(cudaError_t e) {
  static __thread char b[64];
  if (!e) return "no error";
  if (e == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (e == cudaErrorInvalidValue) return "invalid argument";
  if (e == cudaErrorInvalidDevice) return "invalid device ordinal";
  if (e == cudaErrorLaunchFailure) return "unspecified launch failure";
  snprintf(b, sizeof b, "ptxsim error %d", (int)e);
  return b;
}
const char* cudaGetErrorName(cudaError_t e) { return cudaGetErrorString(e); }
cudaError_t cudaDriverGetVersion(int* v) {
  *v = CUDART_VERSION;
  OK;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = CUDART_VERSION;
  OK;
}
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  OK;
}
cudaError_t cudaSetDevice(int d) { return d ? set(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  OK;
}
static int g_cc = 80;
void ptxsim_set_cc(int cc) { g_cc = cc; }
cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) {
  (void)d;
  int small = g_cc == 86 || g_cc == 89 || g_cc >= 120;
  int big = (small ? 99 : g_cc >= 90 ? 227 : g_cc == 75 ? 64 : 163) * 1024;
  switch (a) {
    case cudaDevAttrMaxThreadsPerBlock:
      *v = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 49152;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = big;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *v = big + (g_cc == 75 ? 0 : 1024);
      break;
    case cudaDevAttrWarpSize:
      *v = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *v = g_cc >= 90 && !small ? 132 : 108;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = g_cc / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = g_cc % 10;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *v = g_cc == 75 ? 1024 : small ? 1536 : 2048;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *v = g_cc == 75 || g_cc == 86 ? 16 : small ? 24 : 32;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *v = g_cc == 75 ? 0 : 1024;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *v = 65536;
      break;
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      *v = 1024;
      break;
    case cudaDevAttrMaxBlockDimZ:
      *v = 64;
      break;
    case cudaDevAttrMemoryPoolsSupported:
      *v = 1;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *v = 65536;
      break;
    case cudaDevAttrMaxGridDimX:
      *v = 2147483647;
      break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      *v = 65535;
      break;
    case cudaDevAttrCooperativeLaunch:
      *v = 1;
      break;
    default:
      *v = 0;
  }
  OK;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "ptxsim");
  int v;
#define A(f, a) cudaDeviceGetAttribute(&v, a, d), p->f = v
  A(major, cudaDevAttrComputeCapabilityMajor);
  A(minor, cudaDevAttrComputeCapabilityMinor);
  A(multiProcessorCount, cudaDevAttrMultiProcessorCount);
  A(sharedMemPerBlock, cudaDevAttrMaxSharedMemoryPerBlock);
  A(sharedMemPerBlockOptin, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  A(sharedMemPerMultiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  A(maxThreadsPerBlock, cudaDevAttrMaxThreadsPerBlock);
  A(maxThreadsPerMultiProcessor, cudaDevAttrMaxThreadsPerMultiProcessor);
  p->warpSize = 32;
  p->regsPerBlock = 65536;
  p->totalGlobalMem = 80ull << 30;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  OK;
}
static int attributes(const void* f, int64_t* v) {
  const Ent* k = get(g_fun, n_fun, f);
  return k && g_attr && !g_attr(k->owner, k->name, v);
}
cudaError_t cudaFuncSetAttribute(const void* f, enum cudaFuncAttribute a, int v) {
  Ent* k = get(g_fun, n_fun, f);
  int64_t x[4];
  if (!k || !attributes(f, x)) return set(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (v < 0 || v + x[0] > x[3]) return set(cudaErrorInvalidValue);
    k->dynamic = v;
  }
  OK;
}
cudaError_t cudaFuncSetCacheConfig(const void* f, enum cudaFuncCache c) {
  (void)f;
  (void)c;
  OK;
}
/* Registers are not modelled: numRegs is a constant, and occupancy counts threads, shared memory and block slots. */
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  int64_t x[4];
  memset(a, 0, sizeof *a);
  if (!attributes(f, x)) return set(cudaErrorInvalidDeviceFunction);
  a->sharedSizeBytes = x[0];
  a->localSizeBytes = x[1];
  a->maxThreadsPerBlock = (int)x[2];
  a->numRegs = 32;
  a->maxDynamicSharedSizeBytes = get(g_fun, n_fun, f)->dynamic;
  a->ptxVersion = a->binaryVersion = g_cc;
  OK;
}
static int sm_attribute(enum cudaDeviceAttr a) {
  int v;
  cudaDeviceGetAttribute(&v, a, 0);
  return v;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t s) {
  int64_t x[4];
  *n = 0;
  if (!attributes(f, x)) return set(cudaErrorInvalidDeviceFunction);
  if (b < 1) return set(cudaErrorInvalidValue);
  if (b > x[2] || (int64_t)s + x[0] > x[3]) OK;
  int threads = (b + 31) / 32 * 32, k = sm_attribute(cudaDevAttrMaxThreadsPerMultiProcessor) / threads;
  int slots = sm_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  int64_t shared = (int64_t)s + x[0] + sm_attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  int64_t fit = sm_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / shared;
  if (k > slots) k = slots;
  *n = fit < k ? (int)fit : k;
  OK;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned g) {
  (void)g;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, f, b, s);
}
cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* f, int blocks, int b) {
  int64_t x[4];
  (void)b;
  if (!attributes(f, x)) return set(cudaErrorInvalidDeviceFunction);
  if (blocks < 1) return set(cudaErrorInvalidValue);
  int64_t r = sm_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks -
              sm_attribute(cudaDevAttrReservedSharedMemoryPerBlock) - x[0];
  if (r > x[3] - x[0]) r = x[3] - x[0];
  *bytes = r > 0 ? (size_t)r : 0;
  OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  for (int i = 0; i < n_blk; i++)
    if ((char*)p >= g_blk[i].p && (char*)p < g_blk[i].p + g_blk[i].n) {
      a->type = cudaMemoryTypeDevice;
      a->devicePointer = (void*)p;
      OK;
    }
  a->type = cudaMemoryTypeUnregistered;
  a->hostPointer = (void*)p;
  OK;
}
