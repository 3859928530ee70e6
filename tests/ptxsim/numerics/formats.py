"""Round to odd, rounding of float64 to every PTX float format, and the bit patterns of the small ones."""

from __future__ import annotations

import numpy as np

from ..aliases import Array

F32 = np.float32
F64 = np.float64
U16 = np.uint16
U32 = np.uint32
U64 = np.uint64
I64 = np.int64
CNAN32 = np.uint32(0x7FFFFFFF)
CNAN16 = np.uint16(0x7FFF)


def odd_fix(s: Array, e: Array) -> Array:
    """s = RN(exact), e = exact - s (exact).  Returns the round-to-odd float64 of exact."""
    nz = (e != 0) & np.isfinite(s)
    if not nz.any():
        return s
    bits = s.view(I64).copy() if s.flags.c_contiguous else np.ascontiguousarray(s).view(I64).copy()
    fix = nz & ((bits & 1) == 0)
    up = (e > 0) == (s > 0)
    bits += np.where(fix, np.where(up, 1, -1), 0)
    return bits.view(F64)


def add_odd(p: Array, c: Array) -> Array:
    """round-to-odd float64 of the exact sum p + c (both float64)."""
    s = p + c
    bb = s - p
    e = (p - (s - bb)) + (c - bb)
    return odd_fix(s, e)


def split64(x: Array) -> tuple[Array, Array]:
    t = x * 134217729.0
    hi = t - (t - x)
    return hi, x - hi


def mul_odd(a: Array, b: Array) -> Array:
    """round-to-odd float64 of a*b (Dekker; valid while nothing over/underflows)."""
    p = a * b
    ah, al = split64(a)
    bh, bl = split64(b)
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    return odd_fix(p, e)


def div_odd(a: Array, b: Array) -> Array:
    """round-to-odd float64 quotient for operands that came from float32."""
    q = a / b
    # exact remainder r = a - q*b via error free product
    p = q * b
    qh, ql = split64(q)
    bh, bl = split64(b)
    e = ((qh * bh - p) + qh * bl + ql * bh) + ql * bl
    r = (a - p) - e
    r = np.where(np.isfinite(q) & np.isfinite(r), r, 0.0)
    return odd_fix(q, np.where(b < 0, -r, r))


def sqrt_odd(a: Array) -> Array:
    q = np.sqrt(a)
    p = q * q
    qh, ql = split64(q)
    e = ((qh * qh - p) + 2 * qh * ql) + ql * ql
    r = (a - p) - e
    r = np.where(np.isfinite(q) & np.isfinite(r), r, 0.0)
    return odd_fix(q, r)


def i64_to_odd(x: Array) -> Array:
    """int64/uint64 -> round-to-odd float64 (exact when it fits)."""
    if x.dtype == np.uint64:
        hi = (x >> U64(32)).astype(F64) * 4294967296.0
        lo = (x & U64(0xFFFFFFFF)).astype(F64)
    else:
        x = x.astype(I64)
        hi = (x >> 32).astype(F64) * 4294967296.0
        lo = (x & 0xFFFFFFFF).astype(F64)
    return add_odd(hi, lo)


FORMATS = {  # precision, emin, max finite
    "f32": (24, -126, float(np.finfo(np.float32).max)),
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, float(np.uint32(0x7F7F0000).view(np.float32))),
    "tf32": (11, -126, float(np.uint32(0x7F7FE000).view(np.float32))),
    "e4m3": (4, -6, 448.0),
    "e5m2": (3, -14, 57344.0),
}


def round_fmt(x: Array, fmt: str, mode: str = "rn") -> Array:
    """Round float64 (exact or round-to-odd) to a format; the result stays float64."""
    p, emin, fmax = FORMATS[fmt]
    x = np.asarray(x, F64)
    fin = np.isfinite(x)
    xs = np.where(fin, x, 0.0)
    _, e = np.frexp(xs)
    q = np.maximum(e - 1, emin) - (p - 1)
    y = np.ldexp(xs, -q)
    if mode == "rn":
        r = np.rint(y)
    elif mode == "rz":
        r = np.trunc(y)
    elif mode == "rm":
        r = np.floor(y)
    elif mode == "rp":
        r = np.ceil(y)
    elif mode == "rna":
        t = np.trunc(y)
        r = t + np.where(np.abs(y - t) >= 0.5, np.sign(y), 0.0)
    else:
        raise ValueError(mode)
    r = np.ldexp(r, q)
    big = np.abs(r) > fmax
    if big.any():
        s = np.signbit(r)
        if mode in ("rn", "rna"):
            lim = np.full(r.shape, np.inf)
        elif mode == "rz":
            lim = np.full(r.shape, fmax)
        elif mode == "rm":
            lim = np.where(s, np.inf, fmax)
        else:
            lim = np.where(s, fmax, np.inf)
        r = np.where(big, np.where(s, -lim, lim), r)
    r = np.copysign(r, x)
    return np.where(fin, r, x)


def to_f32(x: Array, mode: str = "rn") -> Array:
    """float64 (exact / round-to-odd) -> float32 with rounding mode."""
    if mode == "rn":
        return x.astype(F32)
    return round_fmt(x, "f32", mode).astype(F32)


def canon32(r: Array) -> Array:
    """Replace every NaN by the canonical PTX f32 NaN 0x7fffffff."""
    n = np.isnan(r)
    if n.any():
        r = np.array(r, F32)
        r.view(U32)[n] = CNAN32
    return r


def ftz32(x: Array) -> Array:
    u = x.view(U32)
    den = (u & U32(0x7F800000)) == 0
    if den.any():
        return np.where(den, u & U32(0x80000000), u).view(F32)
    return x


def sat32(x: Array) -> Array:
    r = np.where(x > 0, np.minimum(x, F32(1)), F32(0))  # NaN -> 0, -0 -> +0
    return r.astype(F32)


# f16 ---------------------------------------------------------------------------
def h2d(u: Array) -> Array:
    return u.view(np.float16).astype(F64)


def h2f(u: Array) -> Array:
    return u.view(np.float16).astype(F32)


def canon16(u: Array, inf_exp: int) -> Array:
    n = (u & U16(0x7FFF)) > U16(inf_exp)
    if n.any():
        u = np.where(n, CNAN16, u)
    return u


def d2h(x: Array, mode: str = "rn") -> Array:
    """float64 (exact / round-to-odd) -> f16 bits."""
    r = round_fmt(x, "f16", mode).astype(np.float16).view(U16)
    return canon16(r, 0x7C00)


def f2h(x: Array) -> Array:
    """float32 -> f16 bits, round to nearest even."""
    return canon16(x.astype(np.float16).view(U16), 0x7C00)


def ftz16(u: Array) -> Array:
    den = (u & U16(0x7C00)) == 0
    return np.where(den, u & U16(0x8000), u)


# bf16 --------------------------------------------------------------------------
def b2f(u: Array) -> Array:
    return (u.astype(U32) << U32(16)).view(F32)


def b2d(u: Array) -> Array:
    return b2f(u).astype(F64)


def f2b(x: Array) -> Array:
    """float32 -> bf16 bits, round to nearest even."""
    u = np.ascontiguousarray(x).view(U32)
    r = ((u + U32(0x7FFF) + ((u >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    n = np.isnan(x)
    if n.any():
        r = np.where(n, CNAN16, r)
    return r


def d2b(x: Array, mode: str = "rn") -> Array:
    r = round_fmt(x, "bf16", mode).astype(F32)
    u = (np.ascontiguousarray(r).view(U32) >> U32(16)).astype(U16)
    return canon16(u, 0x7F80)


# fp8 ---------------------------------------------------------------------------
def d2e4m3(x: Array, satfinite: bool = True) -> Array:
    r = round_fmt(np.clip(x, -1e6, 1e6), "e4m3", "rn")
    a = np.abs(r)
    nan = np.isnan(x)
    a = np.where(a > 448.0, 448.0, a) if satfinite else a
    s = np.signbit(r)
    out = _enc_small(np.where(nan, 0.0, a), 3, 7)
    out = np.where(s, out | 0x80, out)
    return np.where(nan, 0x7F, out).astype(np.uint8)


def d2e5m2(x: Array, satfinite: bool = True) -> Array:
    r = round_fmt(np.clip(x, -1e9, 1e9), "e5m2", "rn")
    a = np.abs(r)
    nan = np.isnan(x)
    a = np.where(a > 57344.0, 57344.0, a)
    s = np.signbit(r)
    out = _enc_small(np.where(nan, 0.0, a), 2, 15)
    out = np.where(s, out | 0x80, out)
    return np.where(nan, 0x7F, out).astype(np.uint8)


def _enc_small(a: Array, mbits: int, bias: int) -> Array:
    m, e = np.frexp(a)
    E = e - 1 + bias
    sub = E <= 0
    man_n = (np.ldexp(m, 1) - 1.0) * (1 << mbits)
    norm = (np.maximum(E, 0).astype(I64) << mbits) + np.rint(man_n).astype(I64)
    subv = np.rint(np.ldexp(a, bias - 1 + mbits)).astype(I64)
    return np.where(a == 0, 0, np.where(sub, subv, norm))


def _table8(mbits: int, bias: int, e4m3: bool) -> Array:
    u = np.arange(256)
    s = np.where(u & 0x80, -1.0, 1.0)
    ebits = 7 - mbits
    e = (u >> mbits) & ((1 << ebits) - 1)
    m = u & ((1 << mbits) - 1)
    v = np.where(e == 0, np.ldexp(m.astype(F64), 1 - bias - mbits), np.ldexp(1.0 + m / (1 << mbits), e - bias))
    if e4m3:
        v = np.where((u & 0x7F) == 0x7F, np.nan, v)
    else:
        top = e == (1 << ebits) - 1
        v = np.where(top & (m == 0), np.inf, np.where(top, np.nan, v))
    return s * v


E4M3 = _table8(3, 7, True)
E5M2 = _table8(2, 15, False)
