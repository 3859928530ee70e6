"""Operand access, and the build context every instruction builder gets."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..aliases import Array, Exec, Operand, Reader, Sel, Writer
from ..errors import UnsupportedError
from ..parse.syntax import WIDTH, Ins, Reg

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group
    from ..program import Program


U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64, F32, F64 = np.int32, np.int64, np.float32, np.float64
NPD: dict[str, Any] = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": U16,
    "u16": U16,
    "s16": np.int16,
    "f16": U16,
    "bf16": U16,
    "b32": U32,
    "u32": U32,
    "s32": I32,
    "f32": F32,
    "f16x2": U32,
    "bf16x2": U32,
    "tf32": U32,
    "u16x2": U32,
    "s16x2": U32,
    "b64": U64,
    "u64": U64,
    "s64": I64,
    "f64": F64,
    "pred": np.bool_,
    "e4m3x2": U16,
    "e5m2x2": U16,
    "e4m3": np.uint8,
    "e5m2": np.uint8,
    "f32x2": U64,
}


STORE: dict[int, Any] = {1: np.bool_, 8: U16, 16: U16, 32: U32, 64: U64}
LOWER: dict[int, Any] = {8: np.uint8, 16: U16, 32: U32, 64: U64}
SIGNED = {"s8", "s16", "s32", "s64"}


def store_width(w: int) -> int:
    return 16 if w == 8 else w


class Ctx:
    """Build context of one instruction."""

    def __init__(self, prog: Program, ins: Ins, rb: int) -> None:
        self.prog, self.ins, self.rb = prog, ins, rb

    def bad(self, why: str = "") -> UnsupportedError:
        i = self.ins
        return UnsupportedError(
            f"unsupported instruction at PTX line {i.line}: {i.text}  {why}".rstrip(), line=i.line, text=i.text
        )

    def slot(self, reg: Reg) -> int:
        return self.rb + reg.slot

    # ---- readers: f(m, sel) -> array
    def rd(self, o: Operand, ty: str) -> Reader:
        k = o[0]
        dt = np.dtype(NPD[ty]) if ty in NPD else None
        if dt is None:
            raise self.bad(f"(type {ty})")
        if k == "reg":
            r = o[1]
            s = self.slot(r)
            if ty == "pred":
                if r.width != 1:
                    raise self.bad("(predicate expected)")
                return lambda m, sel: m.R[s][sel]
            w, rw = WIDTH[ty], store_width(r.width)
            if r.width == 1:
                raise self.bad("(predicate register used as data)")
            if r.width == 128:
                raise self.bad("(b128 operand)")
            if rw == w:
                if dt == STORE[rw]:
                    return lambda m, sel: m.R[s][sel]
                return lambda m, sel: m.R[s][sel].view(dt)
            if rw > w:
                lo = LOWER[w]
                return lambda m, sel: m.R[s][sel].astype(lo).view(dt)
            raise self.bad(f"(register {r.name} narrower than .{ty})")
        if k == "not":
            f = self.rd(o[1], ty)
            if ty != "pred":
                raise self.bad()
            return lambda m, sel: ~f(m, sel)
        if k in ("imm", "f32", "f64", "dec"):
            c = self.const(o, ty)
            return lambda m, sel: c
        if k == "spec":
            nm = o[1]
            w = WIDTH[ty]
            lo = LOWER[w]

            def f(m: Machine, sel: Sel) -> Array:
                a = m.special(nm)
                if len(a) != 1:
                    a = a[sel]
                return a.astype(lo).view(dt)

            return f
        if k == "sym":
            g = self.prog.symbol(self, o[1], o[2])
            lo = LOWER[WIDTH[ty]]
            if isinstance(g, int):
                c = np.array([g & ((1 << WIDTH[ty]) - 1)], lo).view(dt)
                return lambda m, sel: c
            return lambda m, sel: g(m, sel).astype(lo).view(dt)
        raise self.bad(f"(operand {o[0]})")

    def const(self, o: Operand, ty: str) -> Array:
        k, v = o[0], o[1]
        w = WIDTH[ty]
        if ty == "pred":
            return np.array([bool(v)])
        if k == "imm":
            if ty in ("f32", "f64") and not (-1 << 70 < v < 1 << 70):
                raise self.bad()
            if ty == "f32" or ty == "f64":
                # an integer literal used where a float is expected denotes its bit pattern in .b contexts only;
                # nvcc emits 0f/0d literals, so treat a bare integer as a value
                return np.array([v], NPD[ty])
            bits = v & ((1 << w) - 1)
        elif k == "f32":
            if w == 64:
                f = struct.unpack("<f", struct.pack("<I", v))[0]
                bits = struct.unpack("<Q", struct.pack("<d", f))[0] if ty == "f64" else v
            else:
                bits = v
        elif k == "f64":
            if w == 32:
                f = struct.unpack("<d", struct.pack("<Q", v))[0]
                bits = int(np.array([f], F32).view(U32)[0])
            else:
                bits = v
        else:
            if ty in ("f32", "b32"):
                bits = int(np.array([v], F32).view(U32)[0])
            elif ty in ("f64", "b64"):
                bits = int(np.array([v], F64).view(U64)[0])
            elif ty == "f16":
                bits = int(np.array([v], np.float16).view(U16)[0])
            else:
                raise self.bad("(decimal literal)")
        lo = LOWER[w]
        return np.array([bits & ((1 << w) - 1)], lo).view(NPD[ty])

    # ---- writers: f(m, sel, value)
    def wr(self, o: Operand, ty: str) -> Writer:
        k = o[0]
        if k == "sink":
            return lambda m, sel, v: None
        if k != "reg":
            raise self.bad("(destination is not a register)")
        r = o[1]
        s = self.slot(r)
        if ty == "pred":
            if r.width != 1:
                raise self.bad("(destination must be a predicate)")

            def predicate(m: Machine, sel: Sel, v: Array) -> None:
                m.R[s][sel] = v

            return predicate
        wdt, rw = WIDTH[ty], store_width(r.width)
        if r.width == 1:
            raise self.bad("(predicate destination)")
        st = STORE[rw]
        if rw == wdt:
            if np.dtype(NPD[ty]) == st:

                def same(m: Machine, sel: Sel, v: Array) -> None:
                    m.R[s][sel] = v

                return same

            def view(m: Machine, sel: Sel, v: Array) -> None:
                m.R[s][sel] = v.view(st)

            return view
        if rw < wdt:
            raise self.bad(f"(register {r.name} narrower than .{ty})")
        dt = NPD[ty]
        if ty in SIGNED:
            wide = np.dtype(st).str.replace("u", "i")

            def extend(m: Machine, sel: Sel, v: Array) -> None:
                m.R[s][sel] = v.view(dt).astype(wide).view(st)

            return extend
        lo = LOWER[wdt]

        def narrow(m: Machine, sel: Sel, v: Array) -> None:
            m.R[s][sel] = v.view(lo)

        return narrow


def alu(cx: Ctx, dst: Operand, dty: str, srcs: Sequence[Operand], stys: Sequence[str], f: Callable[..., Any]) -> Exec:
    """closure executing dst = f(*srcs)."""
    w = cx.wr(dst, dty)
    rs = [cx.rd(o, t) for o, t in zip(srcs, stys, strict=False)]
    if len(rs) == 1:
        (a,) = rs

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            w(m, s, f(a(m, s)))
    elif len(rs) == 2:
        a, b = rs

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            w(m, s, f(a(m, s), b(m, s)))
    elif len(rs) == 3:
        a, b, c = rs

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            w(m, s, f(a(m, s), b(m, s), c(m, s)))
    else:

        def ex(m: Machine, g: Group) -> None:
            s = g.sel
            w(m, s, f(*[r(m, s) for r in rs]))

    return ex


RND = {"rn", "rz", "rm", "rp", "rna"}
FLOATS = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f64"}
INTS = {"u8", "s8", "b8", "u16", "s16", "b16", "u32", "s32", "b32", "u64", "s64", "b64"}


class Mods:
    """Modifiers of an opcode split into type list, rounding and flags."""

    def __init__(self, cx: Ctx, flags: Iterable[str] = ()) -> None:
        p = cx.ins.parts
        self.tys = []
        self.rnd = None
        self.flags = set()
        for x in p[1:]:
            if x in WIDTH:
                self.tys.append(x)
            elif x in RND:
                self.rnd = x
            elif x in flags:
                self.flags.add(x)
            else:
                raise cx.bad(f"(modifier .{x})")

    def __contains__(self, x: str) -> bool:
        return x in self.flags


def lift2(f: Callable[..., Any]) -> Callable[..., Array]:
    """lift a uint16 function to packed pairs."""

    def g(*xs: Array) -> Array:
        lo = f(*[x.astype(U16) for x in xs])
        hi = f(*[(x >> U32(16)).astype(U16) for x in xs])
        return lo.astype(U32) | (hi.astype(U32) << U32(16))

    return g
