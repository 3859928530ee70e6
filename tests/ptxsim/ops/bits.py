"""Logic, shifts and bit fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..aliases import Array, Exec
from ..parse.syntax import WIDTH
from .context import I64, NPD, U32, U64, Ctx, alu

if TYPE_CHECKING:
    pass


def b_logic(cx: Ctx) -> Exec:
    ins = cx.ins
    op = ins.parts[0]
    ty = ins.parts[-1]
    d, *src = ins.args
    if ty not in ("pred", "b16", "b32", "b64"):
        raise cx.bad()
    f: Any = {
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "not": np.bitwise_not,
        "cnot": lambda x: np.where(x == 0, x.dtype.type(1), x.dtype.type(0)),
    }[op]
    return alu(cx, d, ty, src, [ty] * len(src), f)


def b_shift(cx: Ctx) -> Exec:
    ins = cx.ins
    op, ty = ins.parts[0], ins.parts[-1]
    d, a, b = ins.args
    w = WIDTH[ty]
    dt = NPD[ty]
    if op == "shl":

        def f(x: Array, n: Array) -> Array:
            big = n >= w
            return np.where(big, dt(0), x << np.where(big, 0, n).astype(dt))
    elif ty[0] == "s":

        def f(x: Array, n: Array) -> Array:
            return x >> np.minimum(n, w - 1).astype(dt)
    else:

        def f(x: Array, n: Array) -> Array:
            big = n >= w
            return np.where(big, dt(0), x >> np.where(big, 0, n).astype(dt))

    return alu(cx, d, ty, [a, b], [ty, "u32"], f)


def b_shf(cx: Ctx) -> Exec:
    ins = cx.ins
    left = ins.parts[1] == "l"
    wrap = ins.parts[2] == "wrap"
    d, a, b, c = ins.args

    def f(x: Array, y: Array, n: Array) -> Array:
        n = (n & U32(31)) if wrap else np.minimum(n, U32(32))
        v = (y.astype(U64) << U64(32)) | x.astype(U64)
        n = n.astype(U64)
        if left:
            return ((v << n) >> U64(32)).astype(U32)
        return (v >> n).astype(U32)

    return alu(cx, d, "u32", [a, b, c], ["u32"] * 3, f)


def b_prmt(cx: Ctx) -> Exec:
    ins = cx.ins
    mode = ins.parts[2] if len(ins.parts) > 2 else None
    d, a, b, c = ins.args

    def pick(v: Array, s: Array) -> Array:
        byte = (v >> ((s & U64(7)) * U64(8))) & U64(0xFF)
        sg = (s & U64(8)) != 0
        return np.where(sg, np.where((byte & U64(0x80)) != 0, U64(0xFF), U64(0)), byte)

    def f(x: Array, y: Array, s: Array) -> Array:
        v = (y.astype(U64) << U64(32)) | x.astype(U64)
        s = s.astype(U64)
        r = U64(0)
        if mode is None:
            for i in range(4):
                r = r | (pick(v, (s >> U64(4 * i)) & U64(0xF)) << U64(8 * i))
        else:
            k = s & U64(3)
            for i in range(4):
                ii = U64(i)
                if mode == "f4e":
                    j = k + ii
                elif mode == "b4e":
                    j = (k - ii) & U64(7)
                elif mode == "rc8":
                    j = k
                elif mode == "ecl":
                    j = np.maximum(k, ii)
                elif mode == "ecr":
                    j = np.minimum(k, ii)
                else:
                    j = ((k & U64(1)) << U64(1)) + U64(i & 1)
                r = r | (pick(v, j & U64(7)) << (U64(8) * ii))
        return r.astype(U32)

    return alu(cx, d, "u32", [a, b, c], ["u32"] * 3, f)


def lut3(a: Array, b: Array, c: Array, imm: int) -> Array:
    full = ~(a ^ a)
    r = a ^ a
    for i in range(8):
        if imm >> i & 1:
            t = (a if i & 4 else a ^ full) & (b if i & 2 else b ^ full) & (c if i & 1 else c ^ full)
            r = r | t
    return r


_LUT = {
    0x96: lambda a, b, c: a ^ b ^ c,
    0x80: lambda a, b, c: a & b & c,
    0xFE: lambda a, b, c: a | b | c,
    0xEA: lambda a, b, c: (a & b) | c,
    0xF8: lambda a, b, c: a | (b & c),
    0x6A: lambda a, b, c: (a & b) ^ c,
    0x78: lambda a, b, c: a ^ (b & c),
    0xCA: lambda a, b, c: (a & b) | (~a & c),
}


def b_lop3(cx: Ctx) -> Exec:
    ins = cx.ins
    if ins.args[0][0] == "pair" or len(ins.parts) != 2:
        raise cx.bad("(lop3 with predicate)")
    d, a, b, c, lut = ins.args
    k = lut[1] & 0xFF
    fn = _LUT.get(k)
    return alu(cx, d, "b32", [a, b, c], ["b32"] * 3, fn or (lambda x, y, z: lut3(x, y, z, k)))


def b_bfe(cx: Ctx) -> Exec:
    ty = cx.ins.parts[-1]
    w = WIDTH[ty]
    d, a, b, c = cx.ins.args
    U = NPD[f"u{w}"]

    def f(x: Array, pos: Array, ln: Array) -> Array:
        ux = x.view(U)
        pos = (pos & U32(0xFF)).astype(I64)
        ln = (ln & U32(0xFF)).astype(I64)
        sh = np.where(pos >= w, U(0), ux >> np.minimum(pos, w - 1).astype(U))
        n = np.minimum(ln, w)
        mask = np.where(n >= w, ~U(0), (U(1) << np.minimum(n, w - 1).astype(U)) - U(1))
        r = sh & mask
        if ty[0] == "s":
            sp = np.minimum(pos + ln - 1, w - 1)
            sb = (ux >> np.clip(sp, 0, w - 1).astype(U)) & U(1)
            sb = np.where(ln == 0, U(0), sb)
            # bits i >= len, or pos+i > msb, take the sign bit
            avail = np.clip(np.minimum(ln, w - pos), 0, w)
            m2 = np.where(avail >= w, ~U(0), (U(1) << np.minimum(avail, w - 1).astype(U)) - U(1))
            r = np.where(sb != 0, (r & m2) | ~m2, r & m2)
        return r.view(NPD[ty])

    return alu(cx, d, ty, [a, b, c], [ty, "u32", "u32"], f)


def b_bfi(cx: Ctx) -> Exec:
    ty = cx.ins.parts[-1]
    w = WIDTH[ty]
    U = NPD[f"u{w}"]
    d, a, b, c, e = cx.ins.args

    def f(x: Array, y: Array, pos: Array, ln: Array) -> Array:
        pos = (pos & U32(0xFF)).astype(I64)
        ln = (ln & U32(0xFF)).astype(I64)
        n = np.minimum(ln, w)
        mask = np.where(n >= w, ~U(0), (U(1) << np.minimum(n, w - 1).astype(U)) - U(1))
        p = np.minimum(pos, w - 1).astype(U)
        mask = np.where(pos >= w, U(0), mask << p)
        return (y & ~mask) | ((x << p) & mask)

    return alu(cx, d, f"b{w}", [a, b, c, e], [f"b{w}", f"b{w}", "u32", "u32"], f)


def _msb(x: Array) -> Array:
    """index of the highest set bit of uint64, -1 when zero."""
    r = np.full(x.shape, -1, I64)
    v = x.astype(U64)
    n = np.zeros(v.shape, I64)
    for s in (32, 16, 8, 4, 2, 1):
        t = v >> U64(s)
        nz = t != 0
        n = np.where(nz, n + s, n)
        v = np.where(nz, t, v)
    return np.where(x == 0, r, n)


def b_bits(cx: Ctx) -> Exec:
    ins = cx.ins
    op, ty = ins.parts[0], ins.parts[-1]
    w = WIDTH[ty]
    d, a = ins.args
    if op == "popc":
        return alu(cx, d, "u32", [a], [f"b{w}"], lambda x: np.bitwise_count(x).astype(U32))
    if op == "clz":
        return alu(cx, d, "u32", [a], [f"b{w}"], lambda x: (w - 1 - _msb(x)).astype(U32))
    if op == "brev":
        U = NPD[f"u{w}"]

        def f(x: Array) -> Array:
            r = np.zeros_like(x)
            for i in range(w):
                r |= ((x >> U(i)) & U(1)) << U(w - 1 - i)
            return r

        return alu(cx, d, f"b{w}", [a], [f"b{w}"], f)
    if op == "bfind":
        sh = "shiftamt" in ins.parts

        def f(x: Array) -> Array:
            if ty[0] == "s":
                x = np.where(x < 0, ~x, x)
                x = x.view(NPD[f"u{w}"])
            r = _msb(x)
            if sh:
                r = np.where(r >= 0, w - 1 - r, r)
            return (r & 0xFFFFFFFF).astype(U32)

        return alu(cx, d, "u32", [a], [ty], f)
    raise cx.bad()
