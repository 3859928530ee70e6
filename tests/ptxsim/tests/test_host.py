# ruff: noqa: E501  (CUDA and PTX text)
"""Unmodified host code through the fake CUDA runtime."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch  # noqa: F401  (its global libcudart must not be picked up)

import ptxsim

SRC = r"""
#include <cuda_runtime.h>
#include <stdexcept>
__constant__ float c[4]; __device__ int g;
template <typename T> __global__ void k(T* x, int n, float s) { extern __shared__ float sm[]; sm[threadIdx.x] = s; __syncthreads();
  int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) x[i] = x[i] * sm[threadIdx.x ^ 1] + c[i & 3] + g; }
struct P { float* p; int n; };
__global__ void k2(P p) { int i = threadIdx.x; if (i < p.n) p.p[i] += 1.f; }
extern "C" int run(float* h, int n, int extra) {
  float* d; cudaMalloc(&d, n * 4); cudaMemcpy(d, h, n * 4, cudaMemcpyHostToDevice);
  float hc[4] = {1, 2, 3, 4}; cudaMemcpyToSymbol(c, hc, 16); int ten = 10; cudaMemcpyToSymbol(g, &ten, 4);
  cudaFuncSetAttribute(k<float>, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  cudaStream_t s; cudaStreamCreate(&s); cudaEvent_t e; cudaEventCreate(&e);
  k<float><<<(n + 127) / 128, 128, 512, s>>>(d, n + extra, 2.f);
  P p{d, 32}; void* a[] = {&p}; cudaLaunchKernel((void*)k2, dim3(1), dim3(64), a, 0, s);
  cudaEventRecord(e, s); cudaStreamSynchronize(s);
  cudaMemcpyAsync(h, d, n * 4, cudaMemcpyDeviceToHost, s); cudaFree(d);
  cudaDeviceProp pr; cudaGetDeviceProperties(&pr, 0); int nb; cudaOccupancyMaxActiveBlocksPerMultiprocessor(&nb, k<float>, 128, 0);
  return (int)cudaGetLastError() + (int)cudaDeviceSynchronize() + (pr.warpSize - 32); }
"""


def test_host(arch: str) -> None:
    h = ptxsim.host.Host(src=SRC, arch=arch)
    n = 300
    x = np.arange(n, dtype=np.float32)
    y = x.copy()

    def run(extra: Any) -> Any:
        return h.lib.run(y.ctypes.data_as(ctypes.c_void_p), n, extra)

    assert run(0) == 0
    h.check()
    ref = x * 2 + (np.arange(n) & 3) + 1 + 10
    ref[:32] += 1
    assert (y == ref).all()
    assert len(h.launches) == 2
    assert h.launches[0]["kernel"].startswith("void k<float>")
    assert run(1) == 719
    with pytest.raises(ptxsim.OutOfBoundsError):
        h.check()


CUB = r"""
#include <cub/cub.cuh>
extern "C" int run(const int* x, int* sum, int* scan, int* sorted, int* nsel, int* sel, int n) {
  int *dx, *ds, *dc, *dk, *dn, *dl; cudaMalloc(&dx, 4*n); cudaMalloc(&ds, 4); cudaMalloc(&dc, 4*n); cudaMalloc(&dk, 4*n); cudaMalloc(&dn, 4); cudaMalloc(&dl, 4*n);
  cudaMemcpy(dx, x, 4*n, cudaMemcpyHostToDevice);
  void* t = nullptr; size_t b = 0; int e = 0;
#define RUN(CALL) { t = nullptr; b = 0; e |= (int)CALL; cudaMalloc(&t, b); e |= (int)CALL; cudaFree(t); }
  RUN(cub::DeviceReduce::Sum(t, b, dx, ds, n));
  RUN(cub::DeviceScan::InclusiveSum(t, b, dx, dc, n));
  RUN(cub::DeviceRadixSort::SortKeys(t, b, dx, dk, n));
  RUN(cub::DeviceSelect::Unique(t, b, dk, dl, dn, n));
  cudaMemcpy(sum, ds, 4, cudaMemcpyDeviceToHost); cudaMemcpy(scan, dc, 4*n, cudaMemcpyDeviceToHost); cudaMemcpy(sorted, dk, 4*n, cudaMemcpyDeviceToHost);
  cudaMemcpy(nsel, dn, 4, cudaMemcpyDeviceToHost); cudaMemcpy(sel, dl, 4*n, cudaMemcpyDeviceToHost);
  return e;
}
"""


def test_cub_device_algorithms(arch: str) -> None:
    """reduce, decoupled look-back scan, onesweep radix sort and unique, including their host side dispatch."""
    h = ptxsim.host.Host(
        src=CUB, arch=arch, flags=["-std=c++17"], race_shared="warn", uninit_shared="warn", cooperative=True
    )
    n = 20000
    x = np.random.default_rng(0).integers(-1000, 1000, n).astype(np.int32)
    s, c, k, ns, sl = [np.zeros(m, np.int32) for m in (1, n, n, 1, n)]

    def p(a: Any) -> Any:
        return a.ctypes.data_as(ctypes.c_void_p)

    e = h.lib.run(p(x), p(s), p(c), p(k), p(ns), p(sl), n)
    h.check()
    u = np.unique(x)
    assert e == 0
    assert s[0] == x.sum()
    assert (c == np.cumsum(x)).all()
    assert (k == np.sort(x)).all()
    assert ns[0] == len(u)
    assert (sl[: len(u)] == u).all()
