"""add sub mul mad fma div rem for every type: the integer part, and the choice of the float one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec
from ..parse.syntax import WIDTH
from .context import F32, F64, FLOATS, I32, I64, INTS, NPD, U64, Ctx, Mods, alu, lift2
from .floats import f32_fn, half_fn

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def b_arith(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[0]
    if op in ("add", "sub") and any(x in ("cc",) for x in ins.parts):
        return b_carry(cx)
    md = Mods(cx, ("ftz", "sat", "relu", "lo", "hi", "wide", "cc", "oob"))
    d, *src = ins.args
    ty = md.tys[-1]
    if "oob" in md:
        raise cx.bad()
    if len(md.tys) > 1:
        raise cx.bad("(mixed precision arithmetic)")
    if ty in FLOATS:
        kind = "fma" if op in ("mad", "fma") else op
        rnd = md.rnd or "rn"
        if ty in ("f16", "bf16", "f16x2", "bf16x2"):
            if rnd != "rn":
                raise cx.bad()
            f = half_fn(kind, ty.replace("x2", ""), "sat" in md, "relu" in md, "ftz" in md)
            if ty.endswith("x2"):
                f = lift2(f)
        elif ty == "f32":
            f = f32_fn(kind, rnd, "ftz" in md, "sat" in md)
        else:
            if kind == "fma":

                def f(a: Array, b: Array, c: Array) -> Array:
                    return N.fma64(a, b, c, rnd)
            else:

                def f(a: Array, b: Array) -> Array:
                    return N.op64(kind, a, b, rnd)

        return alu(cx, d, ty, src, [ty] * len(src), f)
    # integers
    if op in ("add", "sub"):
        sat = "sat" in md
        if ty in ("u16x2", "s16x2"):
            f = lift2(np.add if op == "add" else np.subtract)
            return alu(cx, d, ty, src, [ty] * 2, f)
        if sat:
            if ty != "s32":
                raise cx.bad()

            def f(a: Array, b: Array) -> Array:
                r = a.astype(I64) + (b.astype(I64) if op == "add" else -b.astype(I64))
                return np.clip(r, -(2**31), 2**31 - 1).astype(I32)
        else:
            ut = {16: "u16", 32: "u32", 64: "u64"}[WIDTH[ty]]
            f = np.add if op == "add" else np.subtract
            ty = ut
        return alu(cx, d, ty, src, [ty] * 2, f)
    if op in ("mul", "mad"):
        if "cc" in md:
            return b_carry(cx)
        w = WIDTH[ty]
        ut = f"u{w}"
        if "wide" in md:
            wt = ("s" if ty[0] == "s" else "u") + str(w * 2)
            wd = NPD[wt]
            if op == "mul":
                return alu(cx, d, wt, src, [ty, ty], lambda a, b: a.astype(wd) * b.astype(wd))
            return alu(cx, d, wt, src, [ty, ty, wt], lambda a, b, c: a.astype(wd) * b.astype(wd) + c)
        if "hi" in md:
            h = mulhi_fn(ty)
            dt = NPD[ty]
            if op == "mul":
                return alu(cx, d, ty, src, [ty, ty], h)
            if "sat" in md:
                return alu(
                    cx,
                    d,
                    ty,
                    src,
                    [ty] * 3,
                    lambda a, b, c: np.clip(h(a, b).astype(I64) + c.astype(I64), -(2**31), 2**31 - 1).astype(I32),
                )
            return alu(cx, d, ty, src, [ty] * 3, lambda a, b, c: (h(a, b) + c).astype(dt))
        if op == "mul":
            return alu(cx, d, ut, src, [ut] * 2, np.multiply)
        return alu(cx, d, ut, src, [ut] * 3, lambda a, b, c: a * b + c)
    raise cx.bad()


def mulhi_fn(ty: str) -> Callable[[Array, Array], Array]:
    w = WIDTH[ty]
    if w <= 32:
        wt = np.dtype(f"{'i' if ty[0] == 's' else 'u'}{w // 4}")
        nt = NPD[ty]
        sh = wt.type(w)
        return lambda a, b: ((a.astype(wt) * b.astype(wt)) >> sh).astype(nt)

    def umul(a: Array, b: Array) -> Array:
        m32 = U64(0xFFFFFFFF)
        s32 = U64(32)
        al, ah, bl, bh = a & m32, a >> s32, b & m32, b >> s32
        t = al * bl
        k = t >> s32
        t = ah * bl + k
        w1 = t & m32
        w2 = t >> s32
        t = al * bh + w1
        return ah * bh + w2 + (t >> s32)

    if ty[0] == "u":
        return umul

    def smul(a: Array, b: Array) -> Array:
        ua, ub = a.view(U64), b.view(U64)
        r = umul(ua, ub)
        r = r - np.where(a < 0, ub, U64(0)) - np.where(b < 0, ua, U64(0))
        return r.view(I64)

    return smul


def b_carry(cx: Ctx) -> Exec:
    """add.cc addc sub.cc subc mad.cc madc (carry flag per lane)."""
    ins = cx.ins
    md = Mods(cx, ("cc", "lo", "hi"))
    op = ins.parts[0]
    ty = md.tys[-1]
    w = WIDTH[ty]
    ut = f"u{w}"
    wcc = "cc" in md
    d, *src = ins.args
    wr = cx.wr(d, ut)
    rs = [cx.rd(o, ut if op[:3] != "mad" else ty) for o in src]
    use = op in ("addc", "subc", "madc")
    U = NPD[ut]
    hi = mulhi_fn(ty) if "hi" in md else None
    if op[:3] == "mad":

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            a, b, c = [r(m, s) for r in rs]
            p = hi(a, b).view(U) if hi is not None else a.view(U) * b.view(U)
            c = c.view(U)
            r = p + c
            cy = r < p
            if use:
                ci = m.CC[s].astype(U)
                r2 = r + ci
                cy = cy | (r2 < r)
                r = r2
            wr(m, s, r)
            if wcc:
                m.CC[s] = cy
    elif op[:3] == "add":

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            a, b = [r(m, s) for r in rs]
            r = a + b
            cy = r < a
            if use:
                r2 = r + m.CC[s].astype(U)
                cy = cy | (r2 < r)
                r = r2
            wr(m, s, r)
            if wcc:
                m.CC[s] = cy
    else:

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            a, b = [r(m, s) for r in rs]
            r = a - b
            bo = a < b
            if use:
                ci = m.CC[s].astype(U)
                r2 = r - ci
                bo = bo | (r < ci)
                r = r2
            wr(m, s, r)
            if wcc:
                m.CC[s] = bo

    return ex


def idiv(a: Array, b: Array, rem: bool) -> Array:
    """C style truncating division; x/0 gives all ones, x%0 gives x (machine specific in PTX)."""
    dt = a.dtype
    a, b = np.broadcast_arrays(a, b)
    z = b == 0
    if dt.kind == "u":
        bb = np.where(z, dt.type(1), b)
        return np.where(z, a, a % bb) if rem else np.where(z, ~dt.type(0), a // bb)
    ud = np.dtype(dt.str.replace("i", "u"))
    ua = np.where(a < 0, np.zeros_like(a) - a, a).view(ud) if a.size else a.view(ud)
    ub = np.where(b < 0, np.zeros_like(b) - b, b).view(ud)
    ub1 = np.where(z, ud.type(1), ub)
    if rem:
        r = (ua % ub1).view(dt)
        r = np.where(a < 0, np.zeros_like(r) - r, r)
        return np.where(z, a, r)
    q = (ua // ub1).view(dt)
    q = np.where((a < 0) != (b < 0), np.zeros_like(q) - q, q)
    return np.where(z, dt.type(-1), q)


def b_div(cx: Ctx) -> Exec:
    ins = cx.ins
    md = Mods(cx, ("approx", "full", "ftz"))
    ty = md.tys[-1]
    d, a, b = ins.args
    if ty in INTS:
        return alu(cx, d, ty, [a, b], [ty, ty], lambda x, y: idiv(x, y, False))
    if ty == "f64":
        rnd = md.rnd or "rn"
        return alu(cx, d, ty, [a, b], [ty, ty], lambda x, y: N.op64("div", x, y, rnd))
    if ty != "f32":
        raise cx.bad()
    ftz = "ftz" in md
    if "approx" in md:

        def f(x: Array, y: Array) -> Array:
            if ftz:
                x, y = N.ftz32(x), N.ftz32(y)
            r = (x.astype(F64) / y.astype(F64)).astype(F32)
            ay = np.abs(y)
            big = (ay > F32(2.0**126)) & np.isfinite(ay)
            if big.any():
                zz = np.copysign(F32(0), np.where(np.signbit(x) != np.signbit(y), F32(-1), F32(1)))
                r = np.where(big, np.where(np.isfinite(x), zz, np.float32(np.nan)), r)
            r = N.canon32(r)
            return N.ftz32(r) if ftz else r

        return alu(cx, d, ty, [a, b], [ty, ty], f)
    if "full" in md:

        def f(x: Array, y: Array) -> Array:
            if ftz:
                x, y = N.ftz32(x), N.ftz32(y)
            r = N.canon32((x.astype(F64) / y.astype(F64)).astype(F32))
            return N.ftz32(r) if ftz else r

        return alu(cx, d, ty, [a, b], [ty, ty], f)
    return alu(cx, d, ty, [a, b], [ty, ty], f32_fn("div", md.rnd or "rn", ftz, False))


def b_rem(cx: Ctx) -> Exec:
    md = Mods(cx)
    ty = md.tys[-1]
    d, a, b = cx.ins.args
    return alu(cx, d, ty, [a, b], [ty, ty], lambda x, y: idiv(x, y, True))
