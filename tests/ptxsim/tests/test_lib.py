"""Library code compiled from the CUDA toolkit: cub block primitives, cooperative groups, curand Philox."""

from __future__ import annotations

import glob
import os
import site

import numpy as np
import pytest

import ptxsim
from ptxsim.tests.compiled import mod_of, ptx_of
from ptxsim.tests.philox import philox_ref

rng = np.random.default_rng(5)


def test_cub(arch: str) -> None:
    mod = mod_of("lib", arch)
    x = rng.integers(-(10**6), 10**6, (2, 512)).astype(np.int32)
    o = np.zeros((2, 1200), np.int32)
    r = mod.launch("k_cub", 2, 128, [x, o], uninit_shared="warn")
    for b in range(2):
        assert (o[b, :512] == np.sort(x[b])).all()
        assert (o[b, 512:1024] == np.cumsum(x[b])).all()
        assert o[b, 1024] == x[b].sum()
        assert (o[b, 1025:1029] == x[b].reshape(4, 32, 4)[:, :, 0].max(1)).all()
    print(r)


def test_cooperative_groups(arch: str) -> None:
    mod = mod_of("lib", arch)
    x = rng.integers(0, 1000, 128).astype(np.int32)
    o = np.zeros((4, 128), np.int32)
    mod.launch("k_cg", 1, 128, [x, o])
    w = x.reshape(4, 32)
    assert (o[0] == np.repeat(w.sum(1), 32)).all()
    assert (o[1] == np.repeat(x.reshape(8, 16).max(1), 16)).all()
    assert (o[2] == np.cumsum(w, 1).ravel()).all()
    for k in range(4):
        m = w[k] % 3 == 0
        e = np.where(m, m.sum() * 100 + np.cumsum(m) - 1 + 10000 * w[k][m][0], 0)
        assert (o[3].reshape(4, 32)[k] == e).all()


CURAND = """
#include <curand_kernel.h>
__global__ void k(unsigned* u, float4* f, float4* g, unsigned long long seed) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  curandStatePhilox4_32_10_t s; curand_init(seed, i, 0, &s);
  uint4 r = curand4(&s); ((uint4*)u)[i] = r; f[i] = curand_uniform4(&s); g[i] = curand_normal4(&s);
}
"""


def test_curand(arch: str) -> None:
    folders = [ptxsim.host.cuda_include()]
    folders += [p for d in site.getsitepackages() for p in glob.glob(os.path.join(d, "nvidia", "*", "include"))]
    inc = next((p for p in folders if os.path.exists(os.path.join(p, "curand_kernel.h"))), None)
    if inc is None:
        pytest.skip("no curand headers (pip: nvidia-curand)")
    mod = ptxsim.load(ptx_of(src=CURAND, arch=arch, flags=(f"-I{inc}",)))
    n, seed = 256, 1234567890123
    u, f, g = np.zeros((n, 4), np.uint32), np.zeros((n, 4), np.float32), np.zeros((n, 4), np.float32)
    mod.launch("k", 2, 128, [u, f, g, seed])
    i, z = np.arange(n), np.zeros(n, np.int64)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    assert (u == philox_ref([z, z, i, z], key)).all()
    r1 = philox_ref([z + 1, z, i, z], key).astype(np.float64)
    assert np.abs(f - (r1 * 2.0**-32 + 2.0**-33)).max() < 1e-7
    r2 = philox_ref([z + 2, z, i, z], key).astype(np.float64) * 2.0**-32 + 2.0**-33
    a, b = np.sqrt(-2 * np.log(r2[:, 0])), np.sqrt(-2 * np.log(r2[:, 2]))
    ref = np.stack(
        [
            a * np.sin(2 * np.pi * r2[:, 1]),
            a * np.cos(2 * np.pi * r2[:, 1]),
            b * np.sin(2 * np.pi * r2[:, 3]),
            b * np.cos(2 * np.pi * r2[:, 3]),
        ],
        1,
    )
    assert np.abs(g - ref).max() < 2e-3
