"""Launchers of several files, structs by value, registered host buffers, and the queries of the fake runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.host import Host

HEADER = r"""
#pragma once
struct Args { const float* x; float* y; long long n; float scale; int channels[3]; };
#ifdef __CUDACC__
template <typename T> __global__ void scale_kernel(Args a) {
  long long i = (blockIdx.x * (long long)blockDim.x + threadIdx.x);
  if (i < a.n) a.y[i] = (T)a.x[i] * (T)a.scale + a.channels[i % 3];
}
#endif
"""
A_CU = r"""
#include "args.h"
__constant__ int unused[4];
extern "C" int scale(Args a) { scale_kernel<float><<<(a.n + 127) / 128, 128>>>(a); return cudaPeekAtLastError(); }
extern "C" int scale_grid(Args a, int blocks, int threads) {
  scale_kernel<float><<<blocks, threads>>>(a); int p = cudaPeekAtLastError(), e = cudaGetLastError();
  return p == e && cudaGetLastError() == cudaSuccess ? e : -1; }
"""
B_CU = r"""
#include "args.h"
__global__ void __launch_bounds__(256) shared_kernel(float* y) {
  __shared__ float s[512]; extern __shared__ float d[]; s[threadIdx.x] = 1; d[threadIdx.x] = 2; __syncthreads();
  y[threadIdx.x] = s[threadIdx.x] + d[threadIdx.x]; }
extern "C" int scale_double(Args a) { scale_kernel<double><<<(a.n + 127) / 128, 128>>>(a); return cudaGetLastError(); }
extern "C" int query(long long* v) {
  int d = -1, x = 0; cudaGetDevice(&d); v[0] = d;
  cudaDeviceGetAttribute(&x, cudaDevAttrMultiProcessorCount, d); v[1] = x;
  cudaDeviceGetAttribute(&x, cudaDevAttrComputeCapabilityMajor, d); v[2] = x;
  cudaFuncAttributes f; cudaError_t e = cudaFuncGetAttributes(&f, shared_kernel);
  v[3] = f.sharedSizeBytes; v[4] = f.maxThreadsPerBlock;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&x, shared_kernel, 256, 0); v[5] = x;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&x, shared_kernel, 256, 40000); v[6] = x;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&x, shared_kernel, 512, 0); v[7] = x;
  int grid = 0, block = 0; cudaOccupancyMaxPotentialBlockSize(&grid, &block, scale_kernel<double>, 0, 0);
  v[8] = grid; v[9] = block;
  return e; }
extern "C" int shared(float* y, int bytes, int opt_in) {
  if (opt_in && cudaFuncSetAttribute(shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in))
    return cudaGetLastError();
  shared_kernel<<<1, 256, bytes>>>(y); return cudaGetLastError(); }
"""
C_CPP = r"""
#include <cuda_runtime_api.h>
extern "C" int sum_of(const int* v) { int d; return cudaGetDevice(&d) + v[0] + v[1]; }
"""


class Args(ctypes.Structure):
    _fields_ = [
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("n", ctypes.c_longlong),
        ("scale", ctypes.c_float),
        ("channels", ctypes.c_int * 3),
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    d = tmp_path_factory.mktemp("launchers")
    (d / "include").mkdir()
    (d / "include" / "args.h").write_text(HEADER)
    for name, text in (("a.cu", A_CU), ("b.cu", B_CU), ("c.cpp", C_CPP)):
        (d / name).write_text(text)
    return d


def build(folder: Path, arch: str = "sm_80") -> Host:
    files = [folder / "a.cu", folder / "b.cu", folder / "c.cpp"]
    return Host(files, arch=arch, includes=[str(folder / "include")], flags=["-std=c++17"], race_global=True)


@pytest.fixture(scope="module")
def host(folder: Path) -> Host:
    return build(folder)


def expected(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + torch.tensor([1.0, 2.0, 3.0])[torch.arange(len(x)) % 3]


def test_structs_by_value_and_raw_addresses(host: Host) -> None:
    x, y = torch.randn(300), torch.empty(300)
    host.register(x, "x", readonly=True)
    host.register(y, "y", init=False)
    assert y.isnan().all()
    assert host.unwritten(y) == 1200
    a = Args(x.data_ptr(), y.data_ptr(), 300, 2.0, (1, 2, 3))
    for f in (host.lib.scale, host.lib.scale_double):
        assert f(a) == 0
        host.check()
        assert torch.allclose(y, expected(x))
        assert host.unwritten(y) == 0
    a.n = 301  # one element past the end
    assert host.lib.scale(a) == 719
    with pytest.raises(ptxsim.OutOfBoundsError, match="'x'"):
        host.check()
    a.n, a.x, a.y = 300, y.data_ptr(), x.data_ptr()  # the wrong way round
    assert host.lib.scale(a) == 719
    with pytest.raises(ptxsim.ReadOnlyError, match="'x'"):
        host.check()
    host.release()
    assert host.lib.scale(Args(x.data_ptr(), y.data_ptr(), 300, 2.0, (1, 2, 3))) == 719
    with pytest.raises(ptxsim.OutOfBoundsError, match=r"unregistered|no device buffer"):
        host.check()
    assert host.lib.sum_of((ctypes.c_int * 2)(3, 4)) == 7


def test_unwritten_output_and_input(host: Host) -> None:
    x = host.register(np.ones(64, np.float32), "x")
    y = host.register(np.zeros((2, 64), np.float32), "y", init=False)
    assert host.lib.scale(Args(x.ctypes.data, y.ctypes.data, 50, 2.0, (0, 0, 0))) == 0
    host.check()
    assert host.unwritten(y) == 4 * (128 - 50)
    assert np.isnan(y[0, 50:]).all()
    assert (y[0, :50] == 2).all()
    assert host.lib.scale(Args(y.ctypes.data, x.ctypes.data, 64, 2.0, (0, 0, 0))) == 719
    with pytest.raises(ptxsim.UninitGlobalError, match="'y' at offset 200"):
        host.check()
    host.release()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
def test_poison_and_gaps(host: Host, dtype: torch.dtype) -> None:
    z = torch.zeros(4, 6, dtype=dtype)
    host.register(z[:, 1:4], "z", init=False)
    raw = z.view(torch.uint8).reshape(4, 6, z.element_size())
    assert (raw[:, 1:4] == 255).all()
    assert (raw[:, 0] == 0).all()
    assert (raw[:, 4:] == 0).all()
    assert host.unwritten(z[:, 1:4]) == 12 * z.element_size()
    host.release()


def test_errors_of_a_launch(host: Host) -> None:
    x, y = host.register(torch.ones(8)), host.register(torch.ones(8))
    a = Args(x.data_ptr(), y.data_ptr(), 8, 2.0, (0, 0, 0))
    assert host.lib.scale_grid(a, 1, 32) == 0
    for blocks, threads in ((1, 2048), (1, 0), (0, 32)):
        assert host.lib.scale_grid(a, blocks, threads) == 9  # cudaErrorInvalidConfiguration
        with pytest.raises(ptxsim.LaunchError):
            host.check()
    host.release()


def test_queries(folder: Path) -> None:
    hosts = {80: build(folder), 90: build(folder, "sm_90")}
    for cc, sms, shared in ((80, 108, 164), (90, 132, 228)):
        v = (ctypes.c_longlong * 10)()
        assert hosts[cc].lib.query(v) == 0
        blocks = shared * 1024 // (2048 + 40000 + 1024)
        assert list(v) == [0, sms, cc // 10, 2048, 256, 8, blocks, 0, 2 * sms, 1024]


def test_dynamic_shared_memory_needs_the_attribute(host: Host) -> None:
    y = host.register(torch.zeros(256))
    p = ctypes.c_void_p(y.data_ptr())
    fresh = 49 * 1024
    assert host.lib.shared(p, fresh, 0) == 1  # cudaErrorInvalidValue: more than 48 KiB was not asked for
    assert host.lib.shared(p, fresh, 1 << 20) == 1  # more than the device has
    assert host.lib.shared(p, fresh, fresh) == 0
    host.check()
    assert (y == 3).all()
    host.release()


def test_each_library_launches_its_own_kernels(folder: Path) -> None:
    first, second = build(folder), build(folder, "sm_90")
    x, y = first.register(torch.ones(8)), first.register(torch.zeros(8))
    assert first.lib.scale(Args(x.data_ptr(), y.data_ptr(), 8, 2.0, (0, 0, 0))) == 0
    assert len(first.launches) == 1
    assert not second.launches
    first.release()


def test_a_changed_header_is_rebuilt(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "args.h").write_text(HEADER.replace("(T)a.scale +", "(T)a.scale + 100 +"))
    x, y = torch.ones(8), torch.zeros(8)
    for text, want in ((None, 102.0), (HEADER, 2.0)):
        if text:
            (tmp_path / "args.h").write_text(text)
        h = Host(folder / "a.cu", includes=[str(tmp_path)], flags=["-std=c++17"])
        h.register(x), h.register(y)
        assert h.lib.scale(Args(x.data_ptr(), y.data_ptr(), 8, 2.0, (0, 0, 0))) == 0
        h.check()
        assert (y == want).all()
        h.release()


def test_width_counters() -> None:
    src = r"""
    __global__ void k(const float4* x, float* y, int n) {
      int i = threadIdx.x; if (i >= n) return;
      float4 v = x[i]; y[i] = v.x + v.y + v.z + v.w; if (i < 2) y[i + 64] = x[0].x; }
    __global__ void copy(const float4* x, float4* y) { y[threadIdx.x] = x[threadIdx.x]; }
    """
    mod = ptxsim.load(ptxsim.compile(src=src))
    x, y = np.ones((64, 4), np.float32), np.zeros(66, np.float32)
    r = mod.launch("k(", 1, 64, [x, y, 40])
    assert r["global_load"]["by_width"] == {
        4: {"warp_requests": 1, "accesses": 2},
        16: {"warp_requests": 2, "accesses": 40},
    }
    assert r["global_load"]["share_16"] == 640 / 648
    assert r["global_store"]["by_width"] == {4: {"warp_requests": 3, "accesses": 42}}
    assert r["global_store"]["share_16"] == 0
    assert r["global_atomic"]["share_16"] is None
    r = mod.launch("copy(", 1, 64, [x, np.zeros((64, 4), np.float32)])
    assert r["global_load"]["share_16"] == r["global_store"]["share_16"] == 1
    assert "16-byte 100%" in str(r)
