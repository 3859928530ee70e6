"""Correctly rounded float32 and float64 arithmetic in the four IEEE modes, and float to integer conversion."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from ..aliases import Array
from .formats import F32, F64, add_odd, div_odd, sqrt_odd, to_f32


def fma32(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    p, c = np.broadcast_arrays(a.astype(F64) * b.astype(F64), c.astype(F64))
    r = to_f32(add_odd(p, c), mode)
    if mode == "rm":  # exact cancellation gives -0 when rounding down
        r = np.where((r == 0) & (p == -c) & (p != 0), F32(-0.0), r)
    return r


def add32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        return a + b
    r = to_f32(add_odd(a.astype(F64), b.astype(F64)), mode)
    return _zero_sign_add(r, a, b, mode)


def _zero_sign_add(r: Array, a: Array, b: Array, mode: str) -> Array:
    # x + (-x) is -0 in round-down mode
    if mode == "rm":
        z = (r == 0) & ~((a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b)) & (a == -b)
        r = np.where(z, F32(-0.0), r)
    return r


def mul32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        return a * b
    return to_f32(a.astype(F64) * b.astype(F64), mode)


def div32(a: Array, b: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        return a / b
    return to_f32(div_odd(a.astype(F64), b.astype(F64)), mode)


def sqrt32(a: Array, mode: str = "rn") -> Array:
    if mode == "rn":
        return np.sqrt(a)
    return to_f32(sqrt_odd(a.astype(F64)), mode)


_libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
_libm.fma.restype = ctypes.c_double
_libm.fma.argtypes = [ctypes.c_double] * 3
_fma_uf = np.frompyfunc(_libm.fma, 3, 1)


def fma64(a: Array, b: Array, c: Array, mode: str = "rn") -> Array:
    a, b, c = np.broadcast_arrays(a, b, c)
    r = _fma_uf(a, b, c).astype(F64)
    if mode != "rn":
        r = _dir64(
            r, lambda i: Fraction(float(a.flat[i])) * Fraction(float(b.flat[i])) + Fraction(float(c.flat[i])), mode
        )
    return r


def _dir64(r: Array, exact: Callable[[int], Fraction], mode: str) -> Array:
    """Correct RN results to a directed mode with exact rationals (slow, rarely used)."""
    r = np.array(r, F64)
    for i in range(r.size):
        x = float(r.flat[i])
        if not np.isfinite(x):
            continue
        ex = exact(i)
        fx = Fraction(x)
        if fx == ex:
            continue
        if mode == "rz":
            need = abs(fx) > abs(ex)
            to = 0.0
        elif mode == "rm":
            need, to = fx > ex, -np.inf
        else:
            need, to = fx < ex, np.inf
        if need:
            r.flat[i] = np.nextafter(x, to)
    return r


def op64(kind: str, a: Array, b: Array, mode: str) -> Array:
    """add, sub, mul or div of float64 arrays, correctly rounded in any mode."""
    a, b = np.broadcast_arrays(a, b)
    r: Array = {"add": np.add, "sub": np.subtract, "mul": np.multiply}.get(kind, np.divide)(a, b)
    if mode == "rn":
        return r

    def exact(i: int) -> Fraction:
        x, y = Fraction(float(a.flat[i])), Fraction(float(b.flat[i]))
        if kind == "add":
            return x + y
        if kind == "sub":
            return x - y
        if kind == "mul":
            return x * y
        return x / y if y else Fraction(float(r.flat[i]))

    return _dir64(r, exact, mode)


def sqrt64_dir(a: Array, mode: str) -> Array:
    r = np.array(np.sqrt(a), F64)
    for i in range(r.size):
        x, v = float(r.flat[i]), float(a.flat[i])
        if not np.isfinite(x) or x == 0:
            continue
        d = Fraction(x) * Fraction(x) - Fraction(v)
        if d > 0 and mode in ("rz", "rm"):
            r.flat[i] = np.nextafter(x, 0.0)
        elif d < 0 and mode == "rp":
            r.flat[i] = np.nextafter(x, np.inf)
    return r


def float_to_int(x64: Array, dty: str, mode: str, src: str, sat_lo: object = None) -> Array:
    """x64: float64 array of the source value; saturating conversion with PTX NaN rules."""
    w = int(dty[1:])
    signed = dty[0] == "s"
    if mode == "rni":
        r = np.rint(x64)
    elif mode == "rzi":
        r = np.trunc(x64)
    elif mode == "rmi":
        r = np.floor(x64)
    else:
        r = np.ceil(x64)
    nan = np.isnan(r)
    if signed:
        lo, hi = -(1 << (w - 1)), (1 << (w - 1)) - 1
    else:
        lo, hi = 0, (1 << w) - 1
    st = np.dtype(f"i{w // 8}" if signed else f"u{w // 8}")
    over = r >= float(hi) if w == 64 else r > hi
    under = r < lo
    safe = np.where(nan | over | under, 0.0, r)
    out = safe.astype(st)
    out = np.where(over, st.type(hi), np.where(under, st.type(lo), out))
    if nan.any():
        nv = 0 if src != "f64" and w != 64 else -(1 << w - 1) if signed else 1 << w - 1
        out = np.where(nan, st.type(nv), out)
    return out.astype(st)
