from __future__ import annotations

import gc
import struct
from typing import Any

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.machine.state import register_bytes
from ptxsim.memory.shared import SharedMem
from ptxsim.tests.compiled import mod_of
from ptxsim.tests.philox import philox_ref

rng = np.random.default_rng(0)


@pytest.fixture
def mod(arch: str) -> ptxsim.Module:
    return mod_of("basic", arch)


@pytest.mark.parametrize("n", [1, 3, 4, 127, 1000, 4099])
def test_ew_f32(mod: ptxsim.Module, n: int) -> None:
    x, y = rng.standard_normal(n, np.float32), rng.standard_normal(n, np.float32)
    xp, yp, o = mod.mem.alloc(n, np.float32), mod.mem.alloc(n, np.float32), mod.mem.alloc(n, np.float32)
    xp[:], yp[:] = x, y
    r = mod.launch("ew_f32", 3, 128, [xp, yp, o, n, 1.7])
    ref = (x.astype(np.float64) * np.float64(np.float32(1.7)) + y).astype(np.float32)
    assert (o == ref).all()
    if n == 1000:
        assert r["global_store"]["bytes"] == 4 * n
        assert r["global_load"]["bytes"] == 8 * n
        assert r["global_load"]["sectors"] == 2 * 125
        assert r["unique_sectors"]["read"] == 250
        assert r["unique_sectors"]["write"] == 125


@pytest.mark.parametrize("n", [1, 2, 255, 1001])
def test_ew_f16(mod: ptxsim.Module, n: int) -> None:
    x = (rng.standard_normal(n) * 10).astype(np.float16)
    y = (rng.standard_normal(n) * 0.01).astype(np.float16)
    o = np.zeros(n, np.float16)
    mod.launch("ew_f16", -(-n // 128), 128, [x, y, o, n])
    s = (x.astype(np.float64) + y).astype(np.float16)
    ref = (x.astype(np.float64) * y + s).astype(np.float16)
    assert (o == ref).all()


@pytest.mark.parametrize("n", [5, 8, 777, 1024])
def test_ew_bf16(mod: ptxsim.Module, n: int) -> None:
    x = (torch.randn(n) * 3).bfloat16()
    o = torch.zeros(n, dtype=torch.bfloat16)
    mod.launch("ew_bf16", -(-n // 1024), 128, [x, o, n])
    ref = torch.nn.functional.silu(x.double())
    assert ((o.double() - ref).abs() <= ref.abs() * 2**-8 + 1e-30).all()


def test_philox(mod: ptxsim.Module) -> None:
    # Random123 known answer: all zero counter and key
    assert [hex(v) for v in philox_ref([[0], [0], [0], [0]], [0, 0])[0]] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    n, seed, off = 1000, 0x123456789ABCDEF0, 0x9_0000_0005
    o = np.zeros((n, 4), np.uint32)
    mod.launch("k_philox", 8, 128, [o, n, seed, off])
    i = np.arange(n)
    z = np.zeros(n, np.int64)
    ref = philox_ref([z + (off & 0xFFFFFFFF), z + (off >> 32), i, z], [seed & 0xFFFFFFFF, seed >> 32])
    assert (o == ref).all()


def test_boxmuller(mod: ptxsim.Module) -> None:
    n, seed = 2000, 77
    o = np.zeros((n, 4), np.float32)
    mod.launch("k_boxmuller", 16, 128, [o, n, seed])
    i = np.arange(n)
    z = np.zeros(n, np.int64)
    r = philox_ref([i, z, z, z], [seed, 0]).astype(np.float32).astype(np.float64)
    u = r * float(np.float32(2.3283064e-10)) + float(np.float32(1.1641532e-10))
    a, b = np.sqrt(-2 * np.log(u[:, 0])), np.sqrt(-2 * np.log(u[:, 2]))
    t = 6.2831853
    ref = np.stack(
        [a * np.sin(t * u[:, 1]), a * np.cos(t * u[:, 1]), b * np.sin(t * u[:, 3]), b * np.cos(t * u[:, 3])], -1
    )
    assert np.abs(o - ref).max() < 1e-3
    assert np.median(np.abs(o - ref)) < 1e-6
    assert abs(o.mean()) < 0.05
    assert abs(o.std() - 1) < 0.05


def test_block_reduce(mod: ptxsim.Module) -> None:
    x = rng.standard_normal(5000).astype(np.float32)
    o = np.zeros(1, np.float32)
    r = mod.launch("blk_reduce", 3, 256, [x, o, 5000])
    assert abs(o[0] - x.sum(dtype=np.float64)) < 1e-2
    assert r["barriers"] == 3


@pytest.mark.parametrize(("T", "n"), [(32, 32), (256, 250), (1024, 1000), (96, 70)])
def test_scan(mod: ptxsim.Module, T: int, n: int) -> None:
    x = rng.integers(-100, 100, n).astype(np.int32)
    o = np.zeros(n, np.int32)
    mod.launch("blk_scan", 1, T, [x, o, n], shared_bytes=8 * T)
    assert (o == np.cumsum(x)).all()


def test_softmax(mod: ptxsim.Module) -> None:
    x = (rng.standard_normal((7, 333)) * 4).astype(np.float32)
    o = np.zeros_like(x)
    mod.launch("softmax_rows", 7, 128, [x, o, 333])
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    assert np.abs(o - e / e.sum(1, keepdims=True)).max() < 1e-6


def test_transpose_bank_conflicts(mod: ptxsim.Module) -> None:
    n = 64
    x = rng.standard_normal((n, n)).astype(np.float32)
    xb = mod.mem.alloc((n, n), np.float32)
    xb[:] = x
    for pad in (0, 1):
        o = mod.mem.alloc((n, n), np.float32)
        r = mod.launch(f"transpose<{pad}>" if True else "", (2, 2), (32, 8), [xb, o, n])
        assert (o == x.T).all()
        # 128 row writes (conflict free) + 128 column reads (32-way without padding)
        assert r["shared"]["warp_requests"] == 256
        assert r["shared"]["bank_conflicts"] == (128 * 31 if pad == 0 else 0)
        assert r["global_load"]["efficiency"] == 1.0
        assert r["global_store"]["efficiency"] == 1.0
    o = np.zeros((50, 50), np.float32)
    y = x[:50, :50].copy()
    mod.launch("transpose<1>", (2, 2), (32, 8), [y, o, 50])
    assert (o == y.T).all()


def test_atomics(mod: ptxsim.Module) -> None:
    n = 500
    h = np.zeros(21, np.int32)
    h[20] = -1
    u = np.zeros(40, np.uint32)
    u[1] = 3
    f = np.zeros(3, np.float32)
    d = np.zeros(1)
    ll = np.zeros(1, np.uint64)
    h2 = np.zeros(2, np.float16)
    b2 = torch.zeros(2, dtype=torch.bfloat16)
    mod.launch("atomics", 4, 128, [h, u, f, d, ll, h2, b2, n])
    i = np.arange(n)
    assert (h[:13] == np.bincount(i % 13, weights=i)).all()
    assert h[16] == (i * 7 % 1001).max()
    assert h[17] == -(n - 1)
    assert h[18] == np.bitwise_xor.reduce(i)
    assert h[19] == 0x7FFFFFFF
    assert h[20] == np.int32(-(2**31))
    assert u[0] == n % 37
    assert (u[2:39] == np.bincount(i % 37)).all()
    v = 3
    for _ in range(n):
        v = 10 if v == 0 or v > 10 else v - 1
    assert u[1] == v
    assert f[0] == (0.5 * (i & 3)).sum()
    assert f[1] == (i * 37 % 911).max()
    assert f[2] == n
    assert abs(d[0] - 0.1 * i.sum()) < 1e-8
    assert ll[0] == (i.astype(np.uint64) << np.uint64(33)).sum()
    assert h2[0] == n
    assert h2[1] == n / 2
    acc = [torch.tensor(0.0).bfloat16(), torch.tensor(0.0).bfloat16()]
    for _ in range(n):
        acc = [acc[0] + torch.tensor(0.25).bfloat16(), acc[1] + torch.tensor(1.0).bfloat16()]
    assert (b2 == torch.stack(acc)).all()


def test_calls(mod: ptxsim.Module) -> None:
    import math

    p = np.zeros(64, np.float32)
    o = np.zeros(256, np.int32)
    addr = mod.register(p, "p")
    big = struct.pack("<Qifddhhhxx", addr, 5, 0.5, 1.25, -3.5, 1, 2, 3)
    big += b"\0" * (40 - len(big))
    mod.launch("calls", 1, 64, [big, o])
    i = np.arange(64)
    assert (o[:64] == [math.factorial(k % 11) for k in i]).all()
    fib = [0, 1, 1, 2, 3, 5, 8, 13, 21]
    assert (o[64:128] == [fib[k % 9] for k in i]).all()
    assert (o[128:192] == [[2 * k, k * k, -k][k % 3] for k in i]).all()
    assert (o[192:256] == [(1001 + k) * 10000 + k - 1 for k in i]).all()
    for k in range(64):
        t = [0.5 * j + [1, 2, 3][j % 3] for j in range(16)]
        t[k & 15] += 100
        s = sum(t[(j * k) & 15] for j in range(16))
        assert p[k] == s + [1.25, -3.5][k & 1] + (k & 7) + 1 + [10, 20, 30, 40][k & 3]
    assert (mod.get_global("gout", np.float32) == p * 2).all()
    # the same struct with the raw host pointer inside (alias of the registered buffer)
    q = torch.zeros(64)
    mod.register(q, "q")
    big2 = struct.pack("<Q", q.data_ptr()) + big[8:]
    mod.launch("calls", 1, 64, [big2, o])
    assert (q.numpy() == p).all()


def test_switch(mod: ptxsim.Module) -> None:
    x = (np.arange(64) % 14 - 1).astype(np.int32)
    o = np.full(64, 41, np.int32)
    mod.launch("k_switch", 1, 64, [o, x, 5])

    def ref(v: Any) -> Any:
        c = {0: 11, 1: 7, 2: 2 ^ 0x55, 3: -3, 4: 64 + 40, 5: 2, 6: 104, 7: 5, 8: 2, 9: 42, 10: 1000, 11: 77}
        return c.get(v, -1)

    assert (o == [ref(int(v)) for v in x]).all()
    x = (np.arange(64) * 7 % 4).astype(np.int32)
    mod.launch("k_brx", 1, 64, [o, x])
    assert (o == np.array([100, 200, 302, 400])[x]).all()


def test_double(mod: ptxsim.Module) -> None:
    from math import erf

    n = 300
    x = np.linspace(-4, 4, n)
    o, of = np.zeros(3 * n), np.zeros(n, np.float32)
    mod.launch("k_double", 3, 128, [x, o, of, n])
    assert np.allclose(o[:n], np.sqrt(x * x + 1) / (2 + np.cos(x)) + x * x - 1 / 3, rtol=1e-14, atol=1e-14)
    assert np.allclose(o[n : 2 * n], np.exp(-np.abs(x)) + np.log1p(x * x) + np.abs(x) ** 1.5, rtol=1e-14)
    r = (
        np.floor(x)
        + np.rint(x * 3)
        + np.trunc(x * 5)
        + np.fmin(x, 0.5)
        + np.fmod(x, 0.7)
        + np.tanh(x)
        + [erf(v) for v in x]
    )
    assert np.allclose(o[2 * n :], r, rtol=1e-13, atol=1e-13)
    assert (of == x.astype(np.float32)).all()


def test_int64(mod: ptxsim.Module) -> None:
    n = 96
    a = rng.integers(-(2**63), 2**63 - 1, n)
    b = rng.integers(-(2**63), 2**63 - 1, n) >> rng.integers(0, 62, n)
    b[b == 0] = 7
    a[:5] = [0, -1, 2**63 - 1, -(2**63), 5]
    o: Any = np.zeros(11 * n, np.int64)
    mod.launch("k_int64", 1, 128, [a, b, o, n])
    M = 1 << 64

    def s(v: Any) -> Any:
        return (v + (1 << 63)) % M - (1 << 63)

    o = o.reshape(11, n)
    for i in range(n):
        x, y = int(a[i]), int(b[i])
        ux, uy = x % M, y % M
        q = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        p = ux * uy + (uy << 64 | ux)
        sh = y & 63
        ff = (x & -x).bit_length() if x else 0
        exp = [
            s(q),
            s(x - q * y),
            s(ux // uy),
            s(ux % uy),
            (x * y) >> 64,
            s(ux * uy >> 64),
            s(p % M),
            s((p >> 64) % M),
            s((x >> sh) ^ (ux >> sh) ^ (ux << sh) % M),
            64 - ux.bit_length() + 100 * bin(ux).count("1") + 10000 * ff + (int(f"{ux:064b}"[::-1], 2) >> 20),
            s(x * y - min(x, y)),
        ]
        assert [int(v) for v in o[:, i]] == exp, i


def test_idx3(mod: ptxsim.Module) -> None:
    o = np.zeros((2 * 3 * 4) * (4 * 3 * 2), np.int32)
    mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o])
    k = 0
    for bz in range(4):
        for by in range(3):
            for bx in range(2):
                for tz in range(2):
                    for ty in range(3):
                        for tx in range(4):
                            assert o[k] == bx * 1000000 + by * 100000 + bz * 10000 + tx * 100 + ty * 10 + tz
                            k += 1


def test_printf_assert_trap(mod: ptxsim.Module) -> None:
    r = mod.launch("k_printf", 1, 32, [3])
    assert r.stdout == "".join(f"t{t} {t * 1.5:5.2f} str {0x123456789A + t:x}|{chr(97 + t)}%\n" for t in range(3))
    mod.launch("k_assert", 1, 32, [32])
    with pytest.raises(ptxsim.TrapError, match=r"threadIdx\.x < n"):
        mod.launch("k_assert", 1, 32, [20])
    mod.launch("k_trap", 1, 32, [40])
    with pytest.raises(ptxsim.TrapError):
        mod.launch("k_trap", 1, 32, [4])


def test_templates(mod: ptxsim.Module) -> None:
    for name, dt, s in (
        ("k_tmpl<float", np.float32, 6),
        ("k_tmpl<int", np.int32, 20),
        ("k_tmpl<double", np.float64, 42),
    ):
        o = np.zeros(32, dt)
        mod.launch(name, 1, 32, [o])
        assert (o == s + np.arange(32)).all()


def test_small_types(mod: ptxsim.Module) -> None:
    n = 90
    a, b = rng.integers(-128, 128, n).astype(np.int8), rng.integers(0, 256, n).astype(np.uint8)
    c, d = rng.integers(-(2**15), 2**15, n).astype(np.int16), rng.integers(0, 2**16, n).astype(np.uint16)
    o, os, oc = np.zeros(n, np.int32), np.zeros(n, np.int16), np.zeros(n, np.int8)
    mod.launch("k_small", 1, 96, [a, b, c, d, o, os, oc, n])
    ai, bi, ci, di = [v.astype(np.int64) for v in (a, b, c, d)]
    assert (o == (ai * bi + ci * di).astype(np.int32)).all()
    assert (os == (ci + ai).astype(np.int16)).all()
    assert (oc == ((bi >> 1).astype(np.int8).astype(np.int64) - ai).astype(np.int8)).all()


def test_chunking_and_subset(mod: ptxsim.Module) -> None:
    o = np.zeros(24 * 24, np.int32)
    o1 = np.zeros_like(o)
    mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o])
    mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o1], ctas_per_chunk=5)
    assert (o == o1).all()
    o2 = np.zeros_like(o)
    mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o2], only_ctas=[3, 9])
    assert ((o2 != 0).reshape(24, 24).any(1).nonzero()[0] == [3, 9]).all()
    o3 = np.zeros_like(o)
    assert mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o3], only_ctas=[24, 31])["ctas"] == 0  # a grid of 24
    assert not o3.any()


def test_the_memory_of_a_chunk_is_bounded(mod: ptxsim.Module) -> None:
    """A chunk of one CTA where the registers of two would take more than allowed: the same results."""
    o = np.zeros(24 * 24, np.int32)
    o1 = np.zeros_like(o)
    mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o])
    lane = register_bytes(mod.kernel("k_idx3").program(True))
    assert lane > 0
    steps: list[int] = []
    for bound in (lane * 32, lane * 32 * 24):
        seen: set[tuple[int, ...]] = set()
        mod.launch(
            *("k_idx3", (2, 3, 4), (4, 3, 2), [o1]),
            max_chunk_registers=bound,
            trace=lambda ins, lanes, seen=seen: seen.add(tuple(lanes)),
        )
        assert (o == o1).all()
        steps.append(max(max(lanes) for lanes in seen if lanes))
    assert steps[0] < 32 <= steps[1]


def test_a_chunk_is_freed_without_the_garbage_collector(mod: ptxsim.Module) -> None:
    o = np.zeros(24 * 24, np.int32)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            mod.launch("k_idx3", (2, 3, 4), (4, 3, 2), [o], ctas_per_chunk=5)
        assert not any(isinstance(found, SharedMem) for found in gc.get_objects())
    finally:
        gc.enable()
