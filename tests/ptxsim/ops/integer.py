"""The rarer integer instructions: sad, 24-bit products, dot products, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array, Exec
from .context import I32, I64, NPD, U16, U32, U64, Ctx, alu

if TYPE_CHECKING:
    pass


def b_misc_int(cx: Ctx) -> Exec:
    ins = cx.ins
    op, ty = ins.parts[0], ins.parts[-1]
    if op == "sad":
        d, a, b, c = ins.args
        return alu(cx, d, ty, [a, b, c], [ty] * 3, lambda x, y, z: z + np.where(x < y, y - x, x - y))
    if op in ("mul24", "mad24"):
        lo = ins.parts[1] == "lo"
        d, *src = ins.args

        def p24(x: Array, y: Array) -> Array:
            if ty == "s32":
                x = (x << I32(8)) >> I32(8)
                y = (y << I32(8)) >> I32(8)
                p = x.astype(I64) * y.astype(I64)
            else:
                p = (x & U32(0xFFFFFF)).astype(U64) * (y & U32(0xFFFFFF)).astype(U64)
            p = p if lo else p >> p.dtype.type(16)
            return (p & p.dtype.type(0xFFFFFFFF)).astype(U32).view(NPD[ty])

        if op == "mul24":
            return alu(cx, d, ty, src, [ty] * 2, p24)
        return alu(cx, d, ty, src, [ty] * 3, lambda x, y, z: p24(x, y) + z)
    if op == "dp4a":
        t1, t2 = ins.parts[1], ins.parts[2]
        d, a, b, c = ins.args

        def f(x: Array, y: Array, z: Array) -> Array:
            r = z.astype(I64)
            for i in range(4):
                xb = ((x >> U32(8 * i)) & U32(0xFF)).astype(np.uint8)
                yb = ((y >> U32(8 * i)) & U32(0xFF)).astype(np.uint8)
                xv = (xb.view(np.int8) if t1[0] == "s" else xb).astype(I64)
                yv = (yb.view(np.int8) if t2[0] == "s" else yb).astype(I64)
                r = r + xv * yv
            return (r & 0xFFFFFFFF).astype(U32)

        return alu(cx, d, "u32", [a, b, c], ["u32", "u32", "s32" if "s" in t1[0] + t2[0] else "u32"], f)
    if op == "dp2a":
        lo = ins.parts[1] == "lo"
        t1, t2 = ins.parts[2], ins.parts[3]
        d, a, b, c = ins.args

        def f(x: Array, y: Array, z: Array) -> Array:
            r = z.astype(I64)
            for i in range(2):
                xh = ((x >> U32(16 * i)) & U32(0xFFFF)).astype(U16)
                yb = ((y >> U32(8 * i + (0 if lo else 16))) & U32(0xFF)).astype(np.uint8)
                xv = (xh.view(np.int16) if t1[0] == "s" else xh).astype(I64)
                yv = (yb.view(np.int8) if t2[0] == "s" else yb).astype(I64)
                r = r + xv * yv
            return (r & 0xFFFFFFFF).astype(U32)

        return alu(cx, d, "u32", [a, b, c], ["u32", "u32", "s32" if "s" in t1[0] + t2[0] else "u32"], f)
    if op == "bmsk":
        wrap = ins.parts[1] == "wrap"
        d, a, b = ins.args

        def bmsk(pos: Array, ln: Array) -> Array:
            if wrap:
                pos, ln = pos & U32(31), ln & U32(31)
            p, n = pos.astype(U64), np.minimum(ln, U32(32)).astype(U64)
            mask = (U64(1) << n) - U64(1)
            r = np.where(p >= 32, U64(0), mask << np.minimum(p, U64(32)))
            return (r & U64(0xFFFFFFFF)).astype(U32)

        return alu(cx, d, "u32", [a, b], ["u32", "u32"], bmsk)
    if op == "szext":
        wrap = ins.parts[1] == "wrap"
        d, a, b = ins.args

        def szext(x: Array, n: Array) -> Array:
            n = (n & U32(31)) if wrap else np.minimum(n, U32(32))
            n = n.astype(I64)
            v = x.view(U32).astype(I64)
            mask = (np.int64(1) << n) - 1
            low = v & mask
            if ty[0] == "s":
                sb = (v >> np.maximum(n - 1, 0)) & 1
                r = np.where((sb != 0) & (n > 0), low | (~mask & 0xFFFFFFFF), low)
            else:
                r = low
            return (r & 0xFFFFFFFF).astype(U32).view(NPD[ty])

        return alu(cx, d, ty, [a, b], [ty, "u32"], szext)
    if op == "fns":
        d, a, b, c = ins.args

        def fns(mask: Array, base: Array, off: Array) -> Array:
            mask, base, off = np.broadcast_arrays(mask, base, off)
            out = np.full(mask.shape, 0xFFFFFFFF, U32)
            for i in range(mask.size):
                mk, bs, of = int(mask[i]), int(base[i]), int(off[i])
                if of == 0:
                    if mk >> bs & 1:
                        out[i] = bs
                else:
                    cnt, pos, inc = 0, bs, 1 if of > 0 else -1
                    cnt = abs(of) - 1
                    while 0 <= pos < 32:
                        if mk >> pos & 1:
                            if cnt == 0:
                                out[i] = pos
                                break
                            cnt -= 1
                        pos += inc
            return out

        return alu(cx, d, "u32", [a, b, c], ["u32", "u32", "s32"], fns)
    raise cx.bad()
