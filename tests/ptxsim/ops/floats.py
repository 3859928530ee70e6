"""Floating point arithmetic: add, sub, mul, fma, div, the approximate functions, min/max, neg/abs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec
from ..parse.syntax import WIDTH
from .context import F32, F64, FLOATS, NPD, U16, U32, U64, Ctx, Mods, alu, lift2

if TYPE_CHECKING:
    pass


def half_fn(kind: str, base: str, sat: bool, relu: bool, ftz: bool) -> Callable[..., Array]:
    """uint16 -> uint16 arithmetic for f16 / bf16."""
    to_d = N.h2d if base == "f16" else N.b2d
    to_f = N.h2f if base == "f16" else N.b2f
    fr_f = N.f2h if base == "f16" else N.f2b
    fr_d = N.d2h if base == "f16" else N.d2b
    infe = 0x7C00 if base == "f16" else 0x7F80
    one = U16(0x3C00 if base == "f16" else 0x3F80)

    def post(r: Array) -> Array:
        if ftz:
            r = N.ftz16(r)
        if sat:
            v = to_f(r)
            r = np.where(~(v > 0), U16(0), np.where(v > 1, one, r))
        if relu:
            nan = (r & U16(0x7FFF)) > U16(infe)
            r = np.where(((r & U16(0x8000)) != 0) & ~nan, U16(0), r)
        return r

    def pre(xs: Sequence[Array]) -> Sequence[Array]:
        return [N.ftz16(x) for x in xs] if ftz else xs

    if kind in ("add", "sub", "mul"):
        op = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[kind]

        def f(*xs: Array) -> Array:
            a, b = pre(xs)
            return post(fr_f(op(to_f(a), to_f(b))))
    elif kind == "fma":

        def f(*xs: Array) -> Array:
            a, b, c = pre(xs)
            return post(fr_d(N.add_odd(*np.broadcast_arrays(to_d(a) * to_d(b), to_d(c)))))
    else:
        raise KeyError(kind)
    return f


def f32_fn(kind: str, rnd: str, ftz: bool, sat: bool) -> Callable[..., Array]:
    """float32 -> float32 arithmetic with the given rounding, flushing and saturation."""
    z = N.ftz32
    core: Callable[..., Array]
    if kind == "fma":
        core = lambda a, b, c: N.fma32(a, b, c, rnd)  # noqa: E731
    elif kind == "sub" and rnd == "rn":
        core = np.subtract
    else:
        fn: Callable[..., Array] = {
            "add": N.add32,
            "sub": lambda a, b, r: N.add32(a, -b, r),
            "mul": N.mul32,
            "div": N.div32,
        }[kind]
        core = lambda a, b: fn(a, b, rnd)  # noqa: E731

    def f(*xs: Array) -> Array:
        if ftz:
            xs = tuple(z(x) for x in xs)
        r = N.canon32(core(*xs))
        if ftz:
            r = z(r)
        if sat:
            r = N.sat32(r)
        return r

    return f


def _sincos_core(fn: Callable[[Array], Array]) -> Callable[[Array], Array]:
    def f(x: Array) -> Array:
        return np.where(np.isfinite(x), fn(np.where(np.isfinite(x), x, 0.0)), np.nan)

    return f


_APPROX: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": _sincos_core(np.sin),
    "cos": _sincos_core(np.cos),
    "tanh": np.tanh,
}


def b_mufu(cx: Ctx) -> Exec:
    """rcp sqrt rsqrt ex2 lg2 sin cos tanh."""
    ins = cx.ins
    op = ins.parts[0]
    md = Mods(cx, ("approx", "ftz"))
    ty = md.tys[-1]
    d, a = ins.args
    ftz = "ftz" in md
    core = _APPROX[op]
    if ty == "f32":
        if "approx" in md or op in ("rsqrt", "ex2", "lg2", "sin", "cos", "tanh"):

            def f(x: Array) -> Array:
                if ftz:
                    x = N.ftz32(x)
                r = N.canon32(core(x.astype(F64)).astype(F32))
                return N.ftz32(r) if ftz else r
        else:
            rnd = md.rnd or "rn"

            def f(x: Array) -> Array:
                if ftz:
                    x = N.ftz32(x)
                r = N.div32(np.ones_like(x), x, rnd) if op == "rcp" else N.sqrt32(x, rnd)
                r = N.canon32(r)
                return N.ftz32(r) if ftz else r

        return alu(cx, d, ty, [a], [ty], f)
    if ty == "f64":
        if op == "rcp" and md.rnd:
            rnd = md.rnd
            return alu(cx, d, ty, [a], [ty], lambda x: N.op64("div", np.ones_like(x), x, rnd))
        if op == "sqrt" and md.rnd:
            rnd = md.rnd
            return alu(
                cx, d, ty, [a], [ty], (lambda x: np.sqrt(x)) if rnd == "rn" else (lambda x: N.sqrt64_dir(x, rnd))
            )
        if "approx" in md and "ftz" in md and op in ("rcp", "rsqrt"):
            # gross approximation: 20 mantissa bits, low word of the result is zero
            def f(x: Array) -> Array:
                u = x.view(U64)
                den = (u & U64(0x7FF0000000000000)) == 0
                x = np.where(den, u & U64(1 << 63), u).view(F64)
                r = np.ascontiguousarray(core(x)).view(U64)
                nan = np.isnan(r.view(F64))
                r = r & U64(0xFFFFFFFF00000000)
                den = (r & U64(0x7FF0000000000000)) == 0
                r = np.where(den, r & U64(1 << 63), r)
                return np.where(nan, U64(0x7FFFFFFF00000000), r).view(F64)

            return alu(cx, d, ty, [a], [ty], f)
        if op == "rsqrt":
            return alu(cx, d, ty, [a], [ty], core)
        raise cx.bad()
    if op in ("ex2", "tanh") and ty in ("f16", "f16x2", "bf16", "bf16x2"):
        hb = ty.startswith("f16")
        to_d, fr_d = (N.h2d, N.d2h) if hb else (N.b2d, N.d2b)

        def h(x: Array) -> Array:
            if ftz:
                x = N.ftz16(x)
            r = fr_d(core(to_d(x)))
            return N.ftz16(r) if ftz else r

        return alu(cx, d, ty, [a], [ty], lift2(h) if ty.endswith("x2") else h)
    raise cx.bad()


def b_neg_abs(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[0]
    md = Mods(cx, ("ftz",))
    ty = md.tys[-1]
    d, a = ins.args
    w = WIDTH[ty]
    if ty in FLOATS:
        bt = f"b{w}"
        sign = U32(2147516416) if ty in ("f16x2", "bf16x2") else NPD[bt](1 << w - 1)
        NPD[bt]
        ftz = "ftz" in md

        def f(x: Array) -> Array:
            if ftz:
                if ty == "f32":
                    x = N.ftz32(x.view(F32)).view(U32)
                elif ty.endswith("x2"):
                    x = lift2(N.ftz16)(x)
                else:
                    x = N.ftz16(x)
            return (x ^ sign) if op == "neg" else (x & ~sign)

        return alu(cx, d, bt, [a], [bt], f)
    ty2 = ty
    if op == "neg":
        return alu(cx, d, ty2, [a], [ty2], lambda x: np.zeros_like(x) - x)
    return alu(cx, d, ty2, [a], [ty2], lambda x: np.where(x < 0, np.zeros_like(x) - x, x))


def minmax_f(op: str, a: Array, b: Array, nanp: bool, U: Any) -> Array:
    fn = np.fmin if op == "min" else np.fmax
    r = fn(a, b)
    z = (a == 0) & (b == 0)
    if z.any():
        ua, ub = a.view(U), b.view(U)
        r = np.where(z, ((ua | ub) if op == "min" else (ua & ub)).view(r.dtype), r)
    if nanp:
        n = np.isnan(a) | np.isnan(b)
        if n.any():
            r = np.where(n, r.dtype.type(np.nan), r)
    return r


def b_minmax(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[0]
    md = Mods(cx, ("ftz", "NaN", "xorsign", "abs", "relu"))
    ty = md.tys[-1]
    d, *src = ins.args
    if len(src) != 2:
        raise cx.bad("(3-input)")
    a, b = src
    nanp, xs, ftz, relu = "NaN" in md, "xorsign" in md, "ftz" in md, "relu" in md
    if ty == "f32":

        def f(x: Array, y: Array) -> Array:
            if ftz:
                x, y = N.ftz32(x), N.ftz32(y)
            x, y = np.broadcast_arrays(x, y)
            x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
            if xs:
                sg = (x.view(U32) ^ y.view(U32)) & U32(0x80000000)
                x, y = np.abs(x), np.abs(y)
            r = N.canon32(minmax_f(op, x, y, nanp, U32))
            if xs:
                r = (np.ascontiguousarray(r).view(U32) | sg).view(F32)
            return r

        return alu(cx, d, ty, [a, b], [ty, ty], f)
    if ty == "f64":

        def f(x: Array, y: Array) -> Array:
            x, y = [np.ascontiguousarray(v) for v in np.broadcast_arrays(x, y)]
            return minmax_f(op, x, y, nanp, U64)

        return alu(cx, d, ty, [a, b], [ty, ty], f)
    if ty in ("f16", "bf16", "f16x2", "bf16x2"):
        hb = ty.startswith("f16")
        to_f = N.h2f if hb else N.b2f
        infe = U16(0x7C00 if hb else 0x7F80)

        def h(x: Array, y: Array) -> Array:
            if ftz:
                x, y = N.ftz16(x), N.ftz16(y)
            x, y = np.broadcast_arrays(x, y)
            if xs:
                sg = (x ^ y) & U16(0x8000)
                x, y = x & U16(0x7FFF), y & U16(0x7FFF)
            nx, ny = (x & U16(0x7FFF)) > infe, (y & U16(0x7FFF)) > infe
            fx, fy = to_f(np.ascontiguousarray(x)), to_f(np.ascontiguousarray(y))
            take = (fx < fy) if op == "min" else (fx > fy)
            r = np.where(take, x, y)
            z = (fx == 0) & (fy == 0)
            r = np.where(z, (x | y) if op == "min" else (x & y), r)
            r = np.where(nx, y, np.where(ny, x, r))
            r = np.where((nx & ny) | ((nx | ny) if nanp else False), N.CNAN16, r)
            if relu:
                nan = (r & U16(0x7FFF)) > infe
                r = np.where(((r & U16(0x8000)) != 0) & ~nan, U16(0), r)
            if xs:
                r = r | sg
            return r.astype(U16)

        return alu(cx, d, ty, [a, b], [ty, ty], lift2(h) if ty.endswith("x2") else h)
    if ty in ("u16x2", "s16x2"):
        fn = np.minimum if op == "min" else np.maximum

        def h(x: Array, y: Array) -> Array:
            if ty[0] == "s":
                r = fn(x.view(np.int16), y.view(np.int16))
                if relu:
                    r = np.maximum(r, np.int16(0))
                return r.view(U16)
            return fn(x, y)

        return alu(cx, d, ty, [a, b], [ty, ty], lift2(h))
    fn = np.minimum if op == "min" else np.maximum
    if relu:
        return alu(cx, d, ty, [a, b], [ty, ty], lambda x, y: np.maximum(fn(x, y), NPD[ty](0)))
    return alu(cx, d, ty, [a, b], [ty, ty], fn)
