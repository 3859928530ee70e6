from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.tests.compiled import mod_of
from ptxsim.warp.matrix import frag_maps

rng = np.random.default_rng(2)


def mod_for(arch: str) -> Any:
    return mod_of("mma", arch, defines=("SM90",) if arch == "sm_90" else ())


@pytest.fixture
def mod(arch: str) -> ptxsim.Module:
    return mod_for(arch)


@pytest.mark.parametrize("dt", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("K", [32, 128])
def test_gemm(mod: ptxsim.Module, dt: Any, K: Any) -> None:
    torch.manual_seed(0)
    A, B = torch.randn(64, K).to(dt), torch.randn(K, 64).to(dt)
    C = torch.zeros(64, 64)
    r = mod.launch("gemm<__half" if dt == torch.float16 else "gemm<__nv_bf", 1, 128, [A, B, C, K])
    ref = A.double() @ B.double()
    assert (C.double() - ref).abs().max() < 1e-5 * K
    assert r["mma_flops"] == 2 * 64 * 64 * K
    assert r["instructions_by_class"]["mma"] == 4 * 8 * K // 16


def trunc_tf32(x: Any) -> Any:
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def rna_tf32(x: Any) -> Any:
    u = x.view(np.uint32)
    return ((u + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


@pytest.mark.parametrize("rna", [0, 1])
def test_tf32(mod: ptxsim.Module, rna: Any) -> None:
    A, B = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((8, 8)).astype(np.float32)
    C = np.zeros((16, 8), np.float32)
    mod.launch("t_tf32", 1, 32, [A, B, C, rna])
    f = rna_tf32 if rna else trunc_tf32
    c0 = np.array([[1, 2]] * 8 + [[3, 4]] * 8)
    ref = f(A).astype(np.float64) @ f(B) + np.tile(c0, (1, 4))
    assert (ref.astype(np.float32) == C).all()


@pytest.mark.parametrize("bf", [0, 1])
def test_k8(mod: ptxsim.Module, bf: Any) -> None:
    dt = torch.bfloat16 if bf else torch.float16
    A, B = torch.randn(16, 8).to(dt), torch.randn(8, 8).to(dt)
    C = np.zeros((16, 8), np.float32)
    mod.launch("t_k8", 1, 32, [A, B, C, bf])
    assert np.abs(C - (A.double() @ B.double()).numpy()).max() < 1e-5


def test_f16_acc(mod: ptxsim.Module) -> None:
    A, B = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    C = np.zeros((16, 8), np.float16)
    mod.launch("t_h", 1, 32, [A, B, C])
    ref = A.astype(np.float64) @ B + np.array([1.0] * 8 + [2.0] * 8)[:, None]
    assert (ref.astype(np.float16) == C).all()


def test_s8_f64(mod: ptxsim.Module) -> None:
    A, B = rng.integers(-128, 128, (16, 32)).astype(np.int8), rng.integers(-128, 128, (32, 8)).astype(np.int8)
    C = np.zeros((16, 8), np.int32)
    mod.launch("t_s8", 1, 32, [A, B, C])
    c0 = np.tile(np.array([[5, 6]] * 8 + [[7, 8]] * 8), (1, 4))
    assert (A.astype(int) @ B.astype(int) + c0 == C).all()
    P, Q, R = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), np.zeros((8, 8))
    mod.launch("t_f64", 1, 32, [P, Q, R])
    assert np.allclose(R, P @ Q + np.tile([1, 2], 4), rtol=1e-14, atol=1e-14)


def test_ldmatrix(mod: ptxsim.Module) -> None:
    x = rng.integers(0, 65536, (4, 8, 8)).astype(np.uint16)
    o = np.zeros((32, 14), np.uint32)
    r = mod.launch("t_ldm", 1, 32, [x, o])
    xi = x.astype(np.uint32)
    for lane in range(32):
        g, q = lane // 4, lane % 4

        def n(i: int, g: int = g, q: int = q) -> Any:
            return xi[i, g, 2 * q] | xi[i, g, 2 * q + 1] << 16

        def t(i: int, g: int = g, q: int = q) -> Any:
            return xi[i, 2 * q, g] | xi[i, 2 * q + 1, g] << 16

        exp = [n(i) for i in range(4)] + [t(i) for i in range(4)] + [n(0), n(1), t(0), t(1), n(0), t(0)]
        assert list(o[lane]) == exp, lane
    assert r["shared"]["bank_conflicts"] == 0 or r["shared"]["wavefronts"] > 0


def test_stmatrix_elect_vecatomics() -> None:
    mod = mod_for("sm_90")
    x = rng.integers(0, 2**32, (32, 4)).astype(np.uint32)
    o = np.zeros(544, np.uint16)
    mod.launch("t_stm", 1, 32, [x, o])
    s = o[:512].reshape(2, 4, 8, 8)
    for lane in range(32):
        g, q = lane // 4, lane % 4
        for i in range(4):
            lo, hi = x[lane, i] & 0xFFFF, x[lane, i] >> 16
            assert s[0, i, g, 2 * q] == lo
            assert s[0, i, g, 2 * q + 1] == hi
            assert s[1, i, 2 * q, g] == lo
            assert s[1, i, 2 * q + 1, g] == hi
    assert list(o[512:]) == [1] + [0] * 31
    f = mod.mem.alloc(80, np.float32)
    v = np.array([1, 2, 3, 4], np.float32)
    mod.launch("t_atomvec", 1, 32, [f, v.tobytes()])
    assert list(f[:6]) == [32, 64, 96, 128, 32, 64]
    assert sorted(f[8:72:2]) == list(range(32))
    assert (f[9:72:2] == 2 * f[8:72:2]).all()


def test_mma_bugs(mod: ptxsim.Module) -> None:
    C = np.zeros(32, np.float32)
    with pytest.raises((ptxsim.DeadlockError, ptxsim.WarpSyncError)):
        mod.launch("t_mma_partial", 1, 32, [C])
    with pytest.raises(ptxsim.WarpSyncError):
        mod.launch("t_ldm", 1, 16, [np.zeros(256, np.uint16), np.zeros(448, np.uint32)])
    with pytest.raises(ptxsim.MisalignedError):
        mod.launch("t_ldm_misal", 1, 32, [np.zeros(32, np.uint32)])


@pytest.mark.parametrize(
    ("key", "dt", "ct", "M", "N", "K", "ra", "rb"),
    [
        ("__half, float", torch.float16, torch.float32, 16, 16, 32, 1, 0),
        ("__half, __half", torch.float16, torch.float16, 32, 8, 32, 0, 1),
        ("__nv_bfloat16, float", torch.bfloat16, torch.float32, 8, 32, 48, 1, 1),
        ("float, float", torch.float32, torch.float32, 16, 16, 16, 1, 1),
        ("signed char, int", torch.int8, torch.int32, 16, 16, 32, 1, 0),
    ],
)
def test_wmma(mod: ptxsim.Module, key: Any, dt: Any, ct: Any, M: Any, N: int, K: Any, ra: Any, rb: Any) -> None:
    torch.manual_seed(3)
    if dt == torch.int8:
        A, B, C = (
            torch.randint(-100, 100, (M, K)).to(dt),
            torch.randint(-100, 100, (K, N)).to(dt),
            torch.randint(-9, 9, (M, N)).to(ct),
        )
    else:
        A, B, C = torch.randn(M, K).to(dt), torch.randn(K, N).to(dt), torch.randn(M, N).to(ct)
    D = torch.zeros(N, M).to(ct)
    Am, Bm = (A if ra else A.t().contiguous()), (B if rb else B.t().contiguous())
    k = next(x for x in mod.kernels.values() if x.demangled.startswith(f"void t_wmma<{key},"))
    r = mod.launch(k, 1, 32, [Am, Bm, C, D, K, 2.0])
    if dt == torch.float32:
        A, B = [torch.from_numpy(trunc_tf32(v.numpy())) for v in (A, B)]
    ref = (A.double() @ B.double() + C.double()) * 2
    tol = 0 if dt == torch.int8 else 5e-2 if ct == torch.float16 else 1e-4
    assert (D.t().double() - ref).abs().max() <= tol
    assert r["mma_flops"] == 2 * M * N * K


# (shape, A type): strides of (thread%4, thread//4) and of the value index digits, element number = row + rows * col;
# published thread/value maps of the hardware fragments, as plain numbers
LAYOUTS = {
    ("m16n8k8", "f16"): ((32, 1), [(2, 16), (2, 8)], (16, 1), [(2, 8)]),
    ("m16n8k16", "bf16"): ((32, 1), [(2, 16), (2, 8), (2, 128)], (16, 1), [(2, 8), (2, 64)]),
    ("m16n8k4", "tf32"): ((16, 1), [(2, 8)], (8, 1), [(1, 0)]),
    ("m16n8k8", "tf32"): ((16, 1), [(2, 8), (2, 64)], (8, 1), [(2, 32)]),
    ("m16n8k16", "s8"): ((64, 1), [(4, 16), (2, 8)], (32, 1), [(4, 8)]),
    ("m16n8k32", "s8"): ((64, 1), [(4, 16), (2, 8), (2, 256)], (32, 1), [(4, 8), (2, 128)]),
    ("m8n8k4", "f64"): ((8, 1), [(1, 0)], (8, 1), [(1, 0)]),
}


@pytest.mark.parametrize("key", list(LAYOUTS))
def test_fragment_maps(key: Any) -> None:
    maps = frag_maps(key[0], key[1], key[1])
    assert maps is not None
    M, N, _K, A, B, C = maps

    def build(ts: Any, digits: Any) -> Any:
        out = []
        for t in range(32):
            vals = [0]
            for n, s in digits:
                vals = [v + d * s for d in range(n) for v in vals]
            out.append([(t % 4) * ts[0] + (t // 4) * ts[1] + v for v in vals])
        return np.array(out)

    ta, da, tb, db = LAYOUTS[key]
    assert (build(ta, da) == A[0] + M * A[1]).all()  # row + M * col
    assert (build(tb, db) == B[1] + N * B[0]).all()  # n + N * k
    c = build((32, 1), [(2, 16), (2, 8)]) if M == 16 else build((16, 1), [(2, 8)])
    assert (c == C[0] + M * C[1]).all()
