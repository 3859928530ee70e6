"""cvt between every pair of types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec
from ..parse.syntax import WIDTH
from .context import F32, F64, FLOATS, I64, NPD, U16, U32, U64, Ctx, Mods, alu

if TYPE_CHECKING:
    pass


def b_cvt(cx: Ctx) -> Exec:
    ins = cx.ins
    if ins.parts[1] == "pack":
        return b_cvt_pack(cx)
    md = Mods(cx, ("rni", "rzi", "rmi", "rpi", "ftz", "sat", "satfinite", "relu"))
    if len(md.tys) < 2:
        raise cx.bad()
    dty, sty = md.tys[0], md.tys[1]
    d, *src = ins.args
    irnd = next((x for x in ("rni", "rzi", "rmi", "rpi") if x in md), None)
    ftz, sat, relu, satf = "ftz" in md, "sat" in md, "relu" in md, "satfinite" in md
    rnd = md.rnd

    # ---- packed destinations
    if dty in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2") and sty == "f32":
        if rnd not in ("rn", "rz"):
            raise cx.bad()
        if dty in ("f16x2", "bf16x2"):
            cv = _f32_to_half(dty[:-2], rnd, relu, satf)

            def pack16(a: Array, b: Array) -> Array:  # a -> upper, b -> lower
                hi, lo = cv(a).astype(U32), cv(b).astype(U32)
                return (hi << U32(16)) | lo

            return alu(cx, d, "b32", src, ["f32", "f32"], pack16)
        enc = N.d2e4m3 if dty == "e4m3x2" else N.d2e5m2

        def pack8(a: Array, b: Array) -> Array:
            a, b = a.astype(F64), b.astype(F64)
            if relu:
                a, b = [np.where(v < 0, 0.0, v) for v in (a, b)]
            return (enc(a).astype(U16) << U16(8)) | enc(b).astype(U16)

        return alu(cx, d, "b16", src, ["f32", "f32"], pack8)
    if dty in ("e4m3x2", "e5m2x2") and sty == "f16x2":
        enc = N.d2e4m3 if dty == "e4m3x2" else N.d2e5m2

        def narrow8(a: Array) -> Array:
            lo, hi = N.h2d(a.astype(U16)), N.h2d((a >> U32(16)).astype(U16))
            if relu:
                lo, hi = [np.where(v < 0, 0.0, v) for v in (lo, hi)]
            return (enc(hi).astype(U16) << U16(8)) | enc(lo).astype(U16)

        return alu(cx, d, "b16", src, ["b32"], narrow8)
    if dty == "f16x2" and sty in ("e4m3x2", "e5m2x2"):
        tab = N.E4M3 if sty == "e4m3x2" else N.E5M2

        def widen8(a: Array) -> Array:
            lo = N.d2h(tab[a & U16(0xFF)]).astype(U32)
            hi = N.d2h(tab[a >> U16(8)]).astype(U32)
            if relu:
                lo, hi = [np.where((v & U32(0x8000)) != 0, U32(0), v) for v in (lo, hi)]
            return (hi << U32(16)) | lo

        return alu(cx, d, "b32", src, ["b16"], widen8)
    if dty == "tf32":
        if sty != "f32":
            raise cx.bad()
        tf32_mode = rnd or "rn"

        def tf32(a: Array) -> Array:
            r = N.round_fmt(a.astype(F64), "tf32", tf32_mode)
            if satf:
                mx = N.FORMATS["tf32"][2]
                r = np.where(np.isinf(r), np.sign(r) * mx, r)
            if relu:
                r = np.where(r < 0, 0.0, r)
            return N.canon32(r.astype(F32)).view(U32)

        return alu(cx, d, "b32", src, ["f32"], tf32)
    if len(src) != 1:
        raise cx.bad()
    (a,) = src
    df, sf = dty in FLOATS, sty in FLOATS
    if dty not in NPD or sty not in NPD or dty.endswith("x2") or sty.endswith("x2"):
        raise cx.bad()
    # ---- int -> int
    if not df and not sf:
        dd = NPD[dty]
        if sat:
            inf = np.iinfo(dd)

            def resize(x: Array) -> Array:
                if x.dtype.kind == "u":
                    return np.minimum(x.astype(U64), U64(inf.max)).astype(dd)
                v = x.astype(I64)
                hi = min(inf.max, 2**63 - 1)
                return np.clip(v, max(inf.min, -(2**63)), hi).astype(dd)
        else:

            def resize(x: Array) -> Array:
                return x.astype(dd)

        return alu(cx, d, dty, [a], [sty], resize)
    # ---- int -> float
    if df and not sf:
        int_mode = rnd or "rn"

        def from_int(x: Array) -> Array:
            if dty == "f64":
                if int_mode == "rn":
                    return x.astype(F64)
                return _i2d_dir(x, int_mode)
            v = N.i64_to_odd(x) if x.dtype.itemsize == 8 else x.astype(F64)
            return _from_d(v, dty, int_mode, False)

        return alu(cx, d, dty, [a], [sty], from_int)
    # ---- float -> int
    if sf and not df:
        if irnd is None:
            raise cx.bad("(rounding)")

        def to_int(x: Array) -> Array:
            return N.float_to_int(_to_d(x, sty, ftz), dty, irnd, sty)

        return alu(cx, d, dty, [a], [sty], to_int)
    # ---- float -> float
    ir = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(irnd or "")
    mode = rnd or "rn"
    if not relu and not satf and ir is None:
        if dty == "f32" and sty in ("f16", "bf16") and not sat:
            cv = N.h2f if sty == "f16" else N.b2f
            return alu(cx, d, dty, [a], [sty], lambda x: N.canon32(cv(np.ascontiguousarray(x))))
        if sty == "f32" and dty in ("f16", "bf16") and mode == "rn" and not sat:
            cv = N.f2h if dty == "f16" else N.f2b
            return alu(cx, d, dty, [a], [sty], lambda x: cv(N.ftz32(x) if ftz else x))

    def between(x: Array) -> Array:
        v = _to_d(x, sty, ftz)
        if ir is not None:
            v = np.copysign(ir(v), v)
        if sat:
            v = np.where(v > 0, np.minimum(v, 1.0), 0.0)
        if satf and dty in ("f16", "bf16"):
            r = N.round_fmt(v, dty, mode)
            mx = N.FORMATS[dty][2]
            v = np.where(np.abs(r) > mx, np.copysign(mx, v), v)
        if relu:
            v = np.where(v < 0, 0.0, v) + 0.0
        r = _from_d(v, dty, mode, ftz)
        return r

    return alu(cx, d, dty, [a], [sty], between)


def _f32_to_half(base: str, rnd: str, relu: bool, satf: bool) -> Callable[[Array], Array]:
    def f(x: Array) -> Array:
        if rnd == "rn" and not satf:
            r = N.f2h(x) if base == "f16" else N.f2b(x)
        else:
            v = x.astype(F64)
            q = N.round_fmt(v, base, rnd)
            if satf:
                mx = N.FORMATS[base][2]
                q = np.where(np.isinf(q), np.copysign(mx, q), q)
            r = N.d2h(q) if base == "f16" else N.d2b(q)
        if relu:
            nan = (r & U16(0x7FFF)) > U16(0x7C00 if base == "f16" else 0x7F80)
            r = np.where(((r & U16(0x8000)) != 0) & ~nan, U16(0), r)
        return r.astype(U16)

    return f


def _to_d(x: Array, ty: str, ftz: bool) -> Array:
    if ty == "f32":
        return (N.ftz32(x) if ftz else x).astype(F64)
    if ty == "f64":
        return x
    if ty == "f16":
        return N.h2d(np.ascontiguousarray(x))
    return N.b2d(x)


def _from_d(v: Array, ty: str, mode: str, ftz: bool) -> Array:
    if ty == "f64":
        return np.ascontiguousarray(v)
    if ty == "f32":
        r = N.canon32(N.to_f32(v, mode))
        return N.ftz32(np.ascontiguousarray(r)) if ftz else r
    if ty == "f16":
        return N.d2h(v, mode)
    if ty == "bf16":
        return N.d2b(v, mode)
    raise KeyError(ty)


def _i2d_dir(x: Array, mode: str) -> Array:
    out = np.empty(x.shape, F64)
    for i, v in enumerate(x.tolist()):
        f = float(v)
        if int(f) != v:
            if mode == "rz" and abs(int(f)) > abs(v):
                f = float(np.nextafter(f, 0.0))
            elif mode == "rm" and int(f) > v:
                f = float(np.nextafter(f, -np.inf))
            elif mode == "rp" and int(f) < v:
                f = float(np.nextafter(f, np.inf))
        out[i] = f
    return out


def b_cvt_pack(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    if p[2] != "sat":
        raise cx.bad()
    tys = [x for x in p[3:] if x in WIDTH]
    cty, aty = tys[0], tys[1]
    d, a, b, *c = ins.args
    inf = np.iinfo(NPD[cty])
    w = WIDTH[cty]

    def f(x: Array, y: Array, *z: Array) -> Array:

        def q(v: Array) -> Array:
            return (np.clip(v.astype(I64), inf.min, inf.max) & ((1 << w) - 1)).astype(U32)

        if w == 16:
            return (q(x) << U32(16)) | q(y)
        r = (q(x) << U32(w)) | q(y)
        if z:
            r = r | (z[0] << U32(2 * w))
        return r

    return alu(cx, d, "b32", [a, b, *c], [aty, aty] + ["b32"] * len(c), f)
