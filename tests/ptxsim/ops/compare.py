"""Comparison, selection and mov."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec
from ..parse.syntax import WIDTH
from .context import F32, FLOATS, NPD, U16, U32, Ctx, Mods, alu

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


_ORDERED: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _float_cmp(cx: Ctx, op: str) -> Callable[..., Array]:
    """The comparison of float arrays; ordered ones are false, those ending in u true, when an operand is NaN."""
    if op in _ORDERED:
        return _ORDERED[op]
    if op == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if op == "neu":
        return np.not_equal
    if op == "num":
        return lambda a, b: ~unordered(a, b)
    if op == "nan":
        return unordered
    if op in ("equ", "ltu", "leu", "gtu", "geu"):
        h = _ORDERED[op[:2]]
        return lambda a, b: h(a, b) | unordered(a, b)
    raise cx.bad()


def cmp_fn(cx: Ctx, op: str, ty: str, ftz: bool = False) -> Callable[..., Array]:
    """The comparison `op` of two operands of type `ty` as read from their registers."""
    if ty in FLOATS:
        f = _float_cmp(cx, op)
        if ty in ("f16", "bf16", "f16x2", "bf16x2"):
            conv = N.h2f if ty.startswith("f16") else N.b2f

            def half(x: Array) -> Array:
                x = np.ascontiguousarray(x)
                return conv(N.ftz16(x)) if ftz else conv(x)

            return lambda a, b: f(half(a), half(b))
        if ty == "f32" and ftz:
            return lambda a, b: f(N.ftz32(a), N.ftz32(b))
        return f
    t: dict[str, Callable[..., Array]] = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
        "lo": np.less,
        "ls": np.less_equal,
        "hi": np.greater,
        "hs": np.greater_equal,
    }
    if op not in t:
        raise cx.bad()
    return t[op]


_BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def b_setp(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[1]
    rest = ins.parts[2:]
    bop = next((x for x in rest if x in _BOOL), None)
    ftz = "ftz" in rest
    ty = rest[-1]
    if op in ("lo", "ls", "hi", "hs") and ty[0] in "sb":
        ty = "u" + ty[1:]
    d = ins.args[0]
    src = ins.args[1:]
    pair = d[0] == "pair"
    d1, d2 = (d[1], d[2]) if pair else (d, None)
    w1 = cx.wr(d1, "pred")
    w2 = cx.wr(d2, "pred") if d2 is not None else None
    a, b = cx.rd(src[0], ty), cx.rd(src[1], ty)
    c = cx.rd(src[2], "pred") if len(src) > 2 else None
    B = _BOOL.get(bop or "")
    f = cmp_fn(cx, op, ty, ftz)
    if ty in ("f16x2", "bf16x2"):

        def packed(m: Machine, g: Group) -> None:
            s = g.sel
            x, y = a(m, s), b(m, s)
            lo = f(x.astype(U16), y.astype(U16))
            hi = f((x >> U32(16)).astype(U16), (y >> U32(16)).astype(U16))
            if B is not None and c is not None:
                cc = c(m, s)
                lo, hi = B(lo, cc), B(hi, cc)
            w1(m, s, lo)
            if w2 is not None:
                w2(m, s, hi)

        return packed
    if B is None and w2 is None:

        def single(m: Machine, g: Group) -> None:
            s = g.sel
            w1(m, s, f(a(m, s), b(m, s)))

        return single

    def full(m: Machine, g: Group) -> None:
        s = g.sel
        r = f(a(m, s), b(m, s))
        if B is not None and c is not None:
            cc = c(m, s)
            p, q = B(r, cc), B(~r, cc)
        else:
            p, q = r, ~r
        w1(m, s, p)
        if w2 is not None:
            w2(m, s, q)

    return full


def b_set(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[1]
    rest = ins.parts[2:]
    bop = next((x for x in rest if x in _BOOL), None)
    ftz = "ftz" in rest
    tys = [x for x in rest if x in WIDTH]
    if len(tys) == 1:
        raise cx.bad()
    dty, sty = tys
    if op in ("lo", "ls", "hi", "hs") and sty[0] == "s":
        sty = "u" + sty[1:]
    d = ins.args[0]
    src = ins.args[1:]
    f = cmp_fn(cx, op, sty, ftz)
    B = _BOOL.get(bop or "")
    one = {"f32": F32(1), "f16": U16(0x3C00), "bf16": U16(0x3F80), "f16x2": U16(0x3C00), "bf16x2": U16(0x3F80)}

    def conv(r: Array, t: str) -> Array:
        if t in one:
            v = one[t]
            return np.where(r, v, v.dtype.type(0))
        dt = NPD[t]
        return np.where(r, dt(-1) if t[0] == "s" else ~dt(0), dt(0))

    stys = [sty, sty] + (["pred"] if B else [])
    if sty.endswith("x2"):
        half = {"f16x2": "f16x2", "bf16x2": "bf16x2"}.get(dty)

        def packed(x: Array, y: Array, *c: Array) -> Array:
            lo = f(x.astype(U16), y.astype(U16))
            hi = f((x >> U32(16)).astype(U16), (y >> U32(16)).astype(U16))
            if B:
                lo, hi = B(lo, c[0]), B(hi, c[0])
            t = half or "u16"
            return conv(lo, t).astype(U32) | (conv(hi, t).astype(U32) << U32(16))

        return alu(cx, d, "b32", src, stys, packed)

    def single(x: Array, y: Array, *c: Array) -> Array:
        r = f(x, y)
        if B:
            r = B(r, c[0])
        return conv(r, dty)

    return alu(cx, d, dty, src, stys, single)


def b_selp(cx: Ctx) -> Exec:
    ty = cx.ins.parts[-1]
    d, a, b, c = cx.ins.args
    bt = f"b{WIDTH[ty]}" if ty not in ("f32", "f64") else ty
    return alu(cx, d, bt, [a, b, c], [bt, bt, "pred"], lambda x, y, p: np.where(p, x, y))


def b_slct(cx: Ctx) -> Exec:
    md = Mods(cx, ("ftz",))
    dty, cty = md.tys
    d, a, b, c = cx.ins.args
    bt = f"b{WIDTH[dty]}" if dty not in ("f32", "f64") else dty
    ftz = "ftz" in md

    def f(x: Array, y: Array, z: Array) -> Array:
        if ftz:
            z = N.ftz32(z)
        return np.where(z >= 0, x, y)

    return alu(cx, d, bt, [a, b, c], [bt, bt, cty], f)


def b_copysign(cx: Ctx) -> Exec:
    ty = cx.ins.parts[-1]
    w = WIDTH[ty]
    bt = f"b{w}"
    sg = NPD[bt](1 << (w - 1))
    d, a, b = cx.ins.args
    # d = magnitude of b with the sign of a
    return alu(cx, d, bt, [a, b], [bt, bt], lambda x, y: (x & sg) | (y & ~sg))


def b_testp(cx: Ctx) -> Exec:
    op, ty = cx.ins.parts[1], cx.ins.parts[2]
    d, a = cx.ins.args
    tiny = np.finfo(NPD[ty]).tiny
    tests: dict[str, Callable[..., Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < tiny),
    }
    return alu(cx, d, "pred", [a], [ty], tests[op])


def b_mov(cx: Ctx) -> Exec:
    ins = cx.ins
    ty = ins.parts[1]
    d, a = ins.args
    if d[0] == "vec" or a[0] == "vec":
        w = WIDTH[ty]
        if d[0] == "vec":
            k = len(d[1])
            ew = w // k
            if w == 128:
                if a[0] != "reg" or k != 2:
                    raise cx.bad()
                s = cx.slot(a[1])
                ws = [cx.wr(o, "b64") for o in d[1]]

                def ex(m: Machine, g: Group) -> None:
                    v = m.R[s][g.sel].copy()
                    ws[0](m, g.sel, v[:, 0])
                    ws[1](m, g.sel, v[:, 1])

                return ex
            ws = [cx.wr(o, f"b{ew}") for o in d[1]]
            r = cx.rd(a, f"b{w}")
            U = NPD[f"b{w}"]
            E = NPD[f"b{ew}"]

            def ex(m: Machine, g: Group) -> None:
                s = g.sel
                v = r(m, s)
                v = v.copy() if k > 1 else v
                for i in range(k):
                    ws[i](m, s, (v >> U(ew * i)).astype(E))

            return ex
        k = len(a[1])
        ew = w // k
        if w == 128:
            s = cx.slot(d[1])
            rs = [cx.rd(o, "b64") for o in a[1]]

            def ex(m: Machine, g: Group) -> None:
                lo, hi = rs[0](m, g.sel).copy(), rs[1](m, g.sel).copy()
                m.R[s][g.sel, 0] = lo
                m.R[s][g.sel, 1] = hi

            return ex
        rs = [cx.rd(o, f"b{ew}") for o in a[1]]
        wr = cx.wr(d, f"b{w}")
        U = NPD[f"b{w}"]

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            v = U(0)
            for i in range(k):
                v = v | (rs[i](m, s).astype(U) << U(ew * i))
            wr(m, s, v)

        return ex
    if ty == "pred":
        return alu(cx, d, "pred", [a], ["pred"], lambda x: x)
    if ty == "b128":
        sd, sa = cx.slot(d[1]), cx.slot(a[1])

        def ex(m: Machine, g: Group) -> None:
            m.R[sd][g.sel] = m.R[sa][g.sel]

        return ex
    bt = f"b{WIDTH[ty]}"
    if a[0] in ("f32", "f64", "dec", "imm") and ty in ("f32", "f64"):
        return alu(cx, d, ty, [a], [ty], lambda x: x)
    if a[0] in ("f32", "f64") and WIDTH[ty] == (32 if a[0] == "f32" else 64):
        c = np.array([a[1]], NPD[bt])
        put = cx.wr(d, bt)
        return lambda m, g: put(m, g.sel, c)
    return alu(cx, d, bt, [a], [bt], lambda x: x)
