"""Rounding, conversion and integer instruction semantics against exact references."""

from __future__ import annotations

import ctypes.util
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim import numerics as N
from ptxsim.tests.compiled import mod_of

rng = np.random.default_rng(3)
MODES = ["rn", "rz", "rp", "rm"]  # order of R4 in num.cu: rn rz ru rd


@pytest.fixture
def mod(arch: str) -> ptxsim.Module:
    return mod_of("num", arch)


def round_int(fr: Any, mode: str) -> Any:
    fl = fr.numerator // fr.denominator
    if mode == "rm":
        return fl
    if mode == "rp":
        return -((-fr.numerator) // fr.denominator)
    if mode == "rz":
        return fl if fr >= 0 else -((-fr.numerator) // fr.denominator)
    d = fr - fl
    if d > Fraction(1, 2) or (d == Fraction(1, 2) and fl & 1):
        return fl + 1
    return fl


def round_exact(fr: Any, fmt: str, mode: str) -> Any:
    """Fraction -> python float value in a binary format (independent of numerics.py)."""
    p, emin, emax = {"f32": (24, -126, 127), "f64": (53, -1022, 1023), "f16": (11, -14, 15), "bf16": (8, -126, 127)}[
        fmt
    ]
    if fr == 0:
        return 0.0
    a = abs(fr)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    while Fraction(2) ** e > a:
        e -= 1
    while Fraction(2) ** (e + 1) <= a:
        e += 1
    q = max(e, emin) - p + 1
    n = round_int(fr / Fraction(2) ** q, mode)
    r = Fraction(n) * Fraction(2) ** q
    mx = (2 - Fraction(2) ** (1 - p)) * Fraction(2) ** emax
    if abs(r) > mx:
        s = -1 if r < 0 else 1
        if mode == "rn" or (mode == "rp" and s > 0) or (mode == "rm" and s < 0):
            return s * math.inf
        return s * float(mx)
    return float(r)


def interesting32(n: int) -> Any:
    u = rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32)
    x = u.view(np.float32)
    sp = np.array(
        [
            0.0,
            -0.0,
            1.0,
            -1.0,
            0.5,
            1.5,
            2.5,
            -2.5,
            2**31,
            -(2**31),
            2**32,
            2**63,
            2**64,
            1e30,
            -1e30,
            2147483520.0,
            np.inf,
            -np.inf,
            np.nan,
            1e-45,
            -1e-45,
            1.1754944e-38,
            1.1754942e-38,
            65504,
            65519,
            65520,
            5.9e-8,
            3e-8,
            3.4e38,
        ],
        np.float32,
    )
    k = (rng.standard_normal(n) * np.exp2(rng.uniform(-30, 40, n))).astype(np.float32)
    return np.concatenate([sp, x, k])


def to_int_ref(v: Any, ty: str, mode: str, wide_src: Any) -> Any:
    w, s = int(ty[1:]), ty[0] == "s"
    if math.isnan(v):
        if not wide_src and w != 64:
            return 0
        return -(1 << (w - 1)) if s else 1 << (w - 1)
    lo, hi = (-(1 << (w - 1)), (1 << (w - 1)) - 1) if s else (0, (1 << w) - 1)
    if math.isinf(v):
        return hi if v > 0 else lo
    return min(max(round_int(Fraction(v), mode), lo), hi)


def test_float_to_int(mod: ptxsim.Module) -> None:
    x = interesting32(400)
    n = len(x)
    outs = [np.zeros((4, n), d) for d in (np.int32, np.uint32, np.int64, np.uint64)]
    mod.launch("f2i", -(-n // 128), 128, [x, *outs, n])
    for o, ty in zip(outs, ("s32", "u32", "s64", "u64"), strict=False):
        for k, m in enumerate(MODES):
            for i in range(n):
                assert int(o[k, i]) == to_int_ref(float(x[i]), ty, m, False), (x[i], ty, m)
    d = np.concatenate(
        [
            interesting32(200).astype(np.float64),
            rng.standard_normal(200) * 1e9,
            [2147483647.5, -2147483648.5, 4294967295.5],
        ]
    )
    n = len(d)
    outs = [np.zeros((4, n), t) for t in (np.int32, np.uint32, np.int64, np.uint64, np.float32)]
    mod.launch("d2i", -(-n // 128), 128, [d, *outs, n])
    for o, ty in zip(outs, ("s32", "u32", "s64", "u64"), strict=False):
        for k, m in enumerate(MODES):
            for i in range(n):
                assert int(o[k, i]) == to_int_ref(float(d[i]), ty, m, True), (d[i], ty, m)
    for k, m in enumerate(MODES):
        for i in range(n):
            if np.isfinite(d[i]):
                assert float(outs[4][k, i]) == round_exact(Fraction(float(d[i])), "f32", m)


def test_int_to_float(mod: ptxsim.Module) -> None:
    x = np.concatenate(
        [
            rng.integers(-(2**63), 2**63 - 1, 300),
            rng.integers(-(2**33), 2**33, 100),
            [0, 1, -1, 2**63 - 1, -(2**63), 2**31 - 1, 2**24 + 1, 2**53 + 1, 2**62 + 2**38 + 1, 2**62 + 2**38],
        ]
    )
    n = len(x)
    outs = [np.zeros((4, n), t) for t in (np.float32,) * 4 + (np.float64,)]
    mod.launch("i2f", -(-n // 128), 128, [x, *outs, n])
    for i in range(n):
        v = int(x[i])
        s32 = (v + 2**31) % 2**32 - 2**31
        srcs = [s32, v % 2**32, v, v % 2**64, v]
        for o, s, f in zip(outs, srcs, ["f32"] * 4 + ["f64"], strict=False):
            for k, m in enumerate(MODES):
                assert float(o[k, i]) == round_exact(Fraction(s), f, m), (s, f, m)


def _triples(n: int, tiny: int) -> Any:
    def g(lo: Any, hi: Any) -> Any:
        return (rng.standard_normal(n) * np.exp2(rng.uniform(lo, hi, n))).astype(np.float32)

    if tiny:
        return g(-75, -60), g(-75, -60), g(-149, -120)
    a, b = g(-10, 10), g(-10, 10)
    c = np.where(rng.random(n) < 0.5, -(a * b) * (1 + rng.integers(-2, 3, n) * 2.0**-23), g(-30, 10)).astype(np.float32)
    return a, b, c


@pytest.mark.parametrize("tiny", [0, 1])
def test_arith32(mod: ptxsim.Module, tiny: int) -> None:
    a, b, c = _triples(400, tiny)
    n = len(a)
    outs = [np.zeros((4, n), np.float32) for _ in range(6)]
    mod.launch("arith", -(-n // 128), 128, [a, b, c, *outs, n])
    F = Fraction
    for i in range(n):
        x, y, z = float(a[i]), float(b[i]), float(c[i])
        ex = [F(x) + F(y), F(x) * F(y), F(x) * F(y) + F(z), F(x) / F(y), None, 1 / F(x)]
        for j, e in enumerate(ex):
            for k, m in enumerate(MODES):
                if j == 4:
                    if x < 0:
                        assert np.isnan(outs[j][k, i])
                    else:
                        F(math.sqrt(x))
                        # exact square root to 100 bits
                        s = F(math.isqrt(int(F(x) * 4**300)), 2**300)
                        if s * s != F(x):
                            s += F(1, 2**302)
                        assert float(outs[j][k, i]) == round_exact(s, "f32", m)
                else:
                    assert float(outs[j][k, i]) == round_exact(e, "f32", m), (j, m, x, y, z)


def test_arith64(mod: ptxsim.Module) -> None:
    n = 150
    a, b = rng.standard_normal(n), rng.standard_normal(n) * np.exp2(rng.uniform(-20, 20, n))
    c = np.where(rng.random(n) < 0.5, -(a * b), rng.standard_normal(n))
    outs = [np.zeros((4, n)) for _ in range(5)]
    mod.launch("arith64", 2, 128, [a, b, c, *outs, n])
    F = Fraction
    for i in range(n):
        x, y, z = float(a[i]), float(b[i]), float(c[i])
        for j, e in enumerate([F(x) + F(y), F(x) * F(y), F(x) * F(y) + F(z), F(x) / F(y)]):
            for k, m in enumerate(MODES):
                assert float(outs[j][k, i]) == round_exact(e, "f64", m), (j, m)
        if x > 0:
            s = F(math.isqrt(int(F(x) * 4**200)), 2**200) + F(1, 2**202)
            for k, m in enumerate(MODES):
                assert float(outs[4][k, i]) == round_exact(s, "f64", m)


def test_to_half(mod: ptxsim.Module) -> None:
    h: Any = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(np.float16)
    h = h[np.isfinite(h)].astype(np.float32)[::37]
    x = np.concatenate(
        [interesting32(300), h, (h[1:] + h[:-1]) / 2, np.nextafter((h[1:] + h[:-1]) / 2, np.float32(9e9))]
    ).astype(np.float32)
    n = len(x)
    oh, ob, o2 = np.zeros((4, n), np.float16), torch.zeros(4, n, dtype=torch.bfloat16), np.zeros(n, np.float16)
    mod.launch("f2h", -(-n // 128), 128, [x, oh, ob, o2, n])
    t = torch.from_numpy(x)
    assert torch.equal(torch.from_numpy(oh[0]).isnan(), t.isnan())
    ok = ~t.isnan()
    assert torch.equal(torch.from_numpy(oh[0])[ok].view(torch.int16), t.half()[ok].view(torch.int16))
    assert torch.equal(ob[0][ok].view(torch.int16), t.bfloat16()[ok].view(torch.int16))
    for k, m in enumerate(MODES):
        for i in range(0, n, 3):
            if np.isfinite(x[i]):
                fr = Fraction(float(x[i]))
                assert float(oh[k, i]) == round_exact(fr, "f16", m), (x[i], m)
                assert float(ob[k, i]) == round_exact(fr, "bf16", m), (x[i], m)
    for i in range(0, n, 5):
        v = float(x[i]) * 1.0000001
        if np.isfinite(v):
            assert float(o2[i]) == round_exact(Fraction(v), "f16", "rn")


def test_half_ops(mod: ptxsim.Module) -> None:
    n = 2000
    with np.errstate(all="ignore"):
        x, y, z = [rng.integers(0, 65536, n).astype(np.uint16).view(np.float16) for _ in range(3)]
        y[:1000], z[:1000] = [(rng.standard_normal(1000) * 4).astype(np.float16) for _ in range(2)]
        x[:1000] = (rng.standard_normal(1000) * 4).astype(np.float16)
        o = np.zeros((15, n), np.float16)
        mod.launch("hops", -(-n // 128), 128, [x, y, z, o, n])
        a, b, c = [v.astype(np.float64) for v in (x, y, z)]

        def fma(p: Any, q: Any, r: Any) -> Any:
            out = np.full(n, np.nan)
            for i in range(n):
                if np.isfinite(p[i]) and np.isfinite(q[i]) and np.isfinite(r[i]):
                    out[i] = round_exact(
                        Fraction(float(p[i])) * Fraction(float(q[i])) + Fraction(float(r[i])), "f16", "rn"
                    )
                else:
                    out[i] = p[i] * q[i] + r[i]
            return out.astype(np.float16)

        def f(v: Any) -> Any:
            return v.astype(np.float16)

        s = fma(c, np.ones(n), a)
        fm = fma(a, b, c)
        exp = {
            0: f(a + b),
            1: f(a - b),
            2: f(a * b),
            3: fm,
            4: np.fmax(x, y),
            6: np.where(fm < 0, np.float16(0), fm),
            7: np.where(np.isnan(a + b), 0, np.clip(f(a + b), 0, 1)),
            8: np.abs(x),
            5: np.where(np.isnan(x) | np.isnan(y), np.float16(np.nan), np.fmin(x, y)),
            9: fma(a, c, s.astype(np.float64)),
            10: fma(b, a, f(a + b).astype(np.float64)),
            12: np.where(x < y, np.where(~(x < z), x, y), z),
            13: np.rint(x),
        }
        for k, e in exp.items():
            g = o[k]
            bad = ~((g == e) | (np.isnan(g) & np.isnan(e)))
            assert not bad.any(), (k, x[bad][:3], y[bad][:3], z[bad][:3], g[bad][:3], e[bad][:3])
        t = np.tanh(a)
        assert np.nanmax(np.abs(o[14] - t)) < 2e-3


def test_bf16_ops(mod: ptxsim.Module) -> None:
    n = 1500
    bits = torch.from_numpy(rng.integers(-32768, 32768, (3, n)).astype(np.int16)).view(torch.bfloat16)
    bits[:, :900] = (torch.randn(3, 900) * 3).bfloat16()
    x, y, z = [v.contiguous() for v in bits]
    o = torch.zeros(9, n, dtype=torch.bfloat16)
    mod.launch("bops", -(-n // 128), 128, [x, y, z, o, n])
    a, b, c = [v.double() for v in (x, y, z)]

    def fma(p: Any, q: Any, r: Any) -> Any:
        out = []
        for u, v, w in zip(p.tolist(), q.tolist(), r.tolist(), strict=False):
            if all(map(math.isfinite, (u, v, w))):
                out.append(round_exact(Fraction(u) * Fraction(v) + Fraction(w), "bf16", "rn"))
            else:
                out.append(u * v + w)
        return torch.tensor(out, dtype=torch.float64)

    one = torch.ones_like(a)
    s = fma(c, one, a)
    exp = {
        0: fma(a, one, b),
        1: fma(a, one, -b),
        2: fma(a, b, 0 * one),
        3: fma(a, b, c),
        4: torch.fmax(a, b),
        5: torch.minimum(a, b),
        6: fma(a, c, s),
        7: fma(b, a, fma(a, one, b)),
        8: None,
    }
    for k, e in exp.items():
        if e is None:
            e = (x.float() * 1.5).bfloat16().double()
        g = o[k].double()
        bad = ~((g == e) | (g.isnan() & e.isnan()))
        assert not bad.any(), (k, x[bad][:3], y[bad][:3], z[bad][:3], g[bad][:3], e[bad][:3])


def test_fp8() -> None:
    mod = mod_of("num", "sm_90")  # hardware fp8 conversion needs sm_89
    x = np.concatenate(
        [
            rng.standard_normal((500, 2)) * np.exp2(rng.uniform(-12, 12, (500, 1))),
            [[448, 464], [-480, 0], [1e9, -1e9], [57344, 61440]],
        ]
    ).astype(np.float32)
    n = len(x)
    o, back = np.zeros((2, n), np.uint16), np.zeros((2, n, 2), np.float32)
    mod.launch("fp8", -(-n // 128), 128, [x, o, back, n])
    for k, (dt, mx) in enumerate(((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0))):
        ref = torch.from_numpy(x).clamp(-mx, mx).to(dt)
        assert (o[k].view(np.uint8).reshape(n, 2) == ref.view(torch.uint8).numpy()).all()
        assert (back[k] == ref.float().numpy()).all()


def test_approx_and_float_misc(mod: ptxsim.Module) -> None:
    x = np.concatenate([interesting32(200), rng.standard_normal(400).astype(np.float32) * 5]).astype(np.float32)
    n = len(x)
    o = np.zeros((21, n), np.float32)
    mod.launch("approx", -(-n // 128), 128, [x, o, n])
    with np.errstate(all="ignore"):
        d = x.astype(np.float64)
        sub = (np.abs(x) < 1.1754944e-38) & (x != 0)
        z = np.where(sub, np.copysign(0, d), d)

        def flush(v: Any) -> Any:
            return np.where((np.abs(v) < 1.1754944e-38) & (v != 0), np.copysign(0, v), v)

        refs = [
            flush(np.exp2(z)),
            np.log2(d),
            np.sin(d),
            np.cos(z),
            1 / np.sqrt(d),
            np.sqrt(z),
            flush(1 / z),
            np.tanh(d),
            d / 3.0,
        ]
        for k, r in enumerate(refs):
            g = o[k].astype(np.float64)
            r32 = np.asarray(r).astype(np.float32).astype(np.float64)
            bad = ~((np.abs(g - r32) <= np.abs(r32) * 1e-6 + 1e-45) | (g == r32) | (np.isnan(g) & np.isnan(r32)))
            assert not bad.any(), (k, x[bad][:5], g[bad][:5], r32[bad][:5])
            sg = (g == 0) & (r32 == 0)
            assert (np.signbit(g[sg]) == np.signbit(r32[sg])).all(), k
        assert np.isnan(o[9][np.isinf(x)]).all()
        assert (o[9][np.isfinite(x)] == 0).all()
        assert (np.isnan(x) | (o[10] == z.astype(np.float32))).all()
        assert (o[11] == np.where(np.isnan(x), 0, np.clip(x + np.float32(0.25), 0, 1))).all()
        assert ((o[12] == np.minimum(x, 1)) | np.isnan(x)).all()
        assert np.isnan(o[12][np.isnan(x)]).all()
        m = np.fmax(x, np.float32(-0.0))
        assert (o[13] == m).all()
        assert not np.signbit(o[13][x == 0][0])
        assert np.signbit(o[13][(x == 0) & np.signbit(x)]).all()
        xs = np.where(np.isnan(x), 2, np.minimum(np.abs(x), 2)) * np.where(np.signbit(x), 1, -1)
        ok = ~np.isnan(x)
        assert (o[14] == xs)[ok].all()
        assert (o[15] == np.where(np.signbit(x), -7, 7)).all()
        assert ((o[16] == np.ceil(x)) | np.isnan(x)).all()
        assert (o[17] == np.where(np.isnan(x), 0, np.clip(x, 0, 1))).all()
        assert (o[18] == np.where(x >= 0, 1, 2)).all()
        assert (o[19] == np.where((x <= 1) | np.isnan(x), np.float32(2**32), 0)).all()
        p = (x > 5) | sub
        q = ~(x > 5) | sub
        assert (o[20] == p * 1.0 + q * 10.0).all()
    assert (o[8].view(np.uint32)[np.isnan(x)] == 0x7FFFFFFF).all()


def test_numerics_half_exhaustive() -> None:
    u = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    h = u.view(np.float16)
    fin = np.isfinite(h)
    d = h[fin].astype(np.float64)
    assert (N.d2h(d) == u[fin]).all()
    for eps in (1e-9, -1e-9, 0):
        v = (d[:-1] + d[1:]) / 2 * (1 + eps)
        with np.errstate(all="ignore"):
            assert (N.d2h(v) == v.astype(np.float16).view(np.uint16)).all()
    t = torch.from_numpy(u.view(np.int16).copy()).view(torch.bfloat16)
    f = t.float().numpy()
    ok = np.isfinite(f)
    assert (N.f2b(f[ok]) == u[ok]).all()
    assert (N.d2b(f[ok].astype(np.float64)) == u[ok]).all()
    assert np.array_equal(N.b2f(u)[ok], f[ok])


def test_numerics_fma32_hard() -> None:
    """double rounding cases: product + tiny addend next to a rounding boundary"""
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    libm.fmaf.restype = ctypes.c_float
    libm.fmaf.argtypes = [ctypes.c_float] * 3
    n = 4000
    a = (1 + rng.integers(0, 2**12, n) * 2.0**-12).astype(np.float32)
    b = (1 + rng.integers(0, 2**12, n) * 2.0**-12).astype(np.float32)
    c = (rng.choice([-1, 1], n) * np.exp2(rng.integers(-80, -20, n).astype(np.float64))).astype(np.float32)
    g = N.fma32(a, b, c)
    assert all(float(g[i]) == libm.fmaf(float(a[i]), float(b[i]), float(c[i])) for i in range(n))
