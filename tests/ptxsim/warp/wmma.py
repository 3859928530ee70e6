"""wmma.load, wmma.store and wmma.mma.

PTX leaves the fragment layout unspecified: ours is element (lane * slots + slot) mod (number of elements), row major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec, Reader
from ..instr.address import addr_reader
from ..ops.context import F32, F64, I32, I64, U16, U32, U64, Ctx
from ..parse.syntax import WIDTH
from .matrix import elements, unpack

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


# element (lane * slots + slot) mod (number of elements), row major)
def _wshape(x: str) -> tuple[int, int, int]:
    a, rest = x[1:].split("n")
    b, c = rest.split("k")
    return int(a), int(b), int(c)


def b_wmma(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    shp = next((x for x in p if x[0] == "m" and "n" in x and "k" in x and x[1].isdigit()), None)
    if shp is None or p[1] not in ("load", "mma", "store"):
        raise cx.bad()
    M, Nn, K = _wshape(shp)
    tys = [x for x in p if x in WIDTH]
    kind = p[1]

    def nel(ty: str) -> int:  # elements per 32-bit register
        return {"f16": 2, "bf16": 2, "tf32": 1, "f32": 1, "s32": 1, "s8": 4, "u8": 4, "f64": 1}[ty]

    def mem_es(ty: str) -> int:
        return {"f16": 2, "bf16": 2, "tf32": 4, "f32": 4, "s32": 4, "s8": 1, "u8": 1, "f64": 8}[ty]

    if kind in ("load", "store"):
        which = p[2]
        ty = tys[-1]
        row = "row" in p
        sp = next((x.split("::")[0] for x in p if x.split("::")[0] in ("global", "shared")), "generic")
        if kind == "load":
            vec, addr, *st = ins.args
        else:
            addr, vec, *st = ins.args
        regs = elements(vec)
        R, C = {"a": (M, K), "b": (K, Nn), "c": (M, Nn), "d": (M, Nn)}[which]
        per, es = nel(ty), mem_es(ty)
        rt = "b64" if ty == "f64" else "b32"
        S = len(regs) * per
        e = (np.arange(32)[:, None] * S + np.arange(S)[None, :]) % (R * C)
        rr, cc = e // C, e % C
        fa = addr_reader(cx, addr)
        rst = cx.rd(st[0], "u32") if st else None
        ws = [cx.wr(o, rt) for o in regs] if kind == "load" else []
        rs = [cx.rd(o, rt) for o in regs] if kind == "store" else []
        U: Any = {1: np.uint8, 2: U16, 4: U32, 8: U64}[es]
        W2: Any = U64 if ty == "f64" else U32

        def transfer(m: Machine, g: Group) -> None:
            ln, s = g.lanes, g.lsel
            n = len(ln)
            a = np.broadcast_to(fa(m, s), (n,))
            ld = np.broadcast_to(rst(m, s).astype(I64), (n,)) if rst is not None else np.full(n, C if row else R, I64)
            q = ln & 31
            if kind == "load":
                for i, w in enumerate(ws):
                    v = np.zeros(n, W2)
                    for j in range(per):
                        r, c = rr[q, i * per + j], cc[q, i * per + j]
                        off = (r * ld + c if row else c * ld + r) * es
                        x = m.load(sp, ins, ln, a + off, es, 1)[:, 0]
                        v |= x.astype(W2) << W2(8 * es * j)
                    w(m, s, v)
            else:
                for i, rd in enumerate(rs):
                    v = np.broadcast_to(rd(m, s), (n,))
                    for j in range(per):
                        r, c = rr[q, i * per + j], cc[q, i * per + j]
                        off = (r * ld + c if row else c * ld + r) * es
                        m.store(sp, ins, ln, a + off, es, (v >> W2(8 * es * j)).astype(U)[:, None])

        return transfer
    # mma
    if len(tys) == 2:
        dty, cty = tys
        aty = bty = "f16"
    elif len(tys) == 4:
        dty, aty, bty, cty = tys
    else:
        raise cx.bad()
    D, a, b, c = ins.args

    def t(ty: str) -> str:
        return "b64" if ty == "f64" else "b32"

    ra, rb, rc = [[cx.rd(o, t(ty)) for o in elements(x)] for x, ty in ((a, aty), (b, bty), (c, cty))]
    wd = [cx.wr(o, t(dty)) for o in elements(D)]
    satf = "satfinite" in p
    flops = 2 * M * Nn * K

    def gather(m: Machine, g: Group, rs: list[Reader], ty: str, R: int, C: int) -> Array:
        Wn = len(g.lanes) // 32
        v = [np.broadcast_to(r(m, g.lsel), g.lanes.shape).reshape(Wn, 32) for r in rs]
        if ty == "f32":
            x = np.stack(v, -1).view(F32).astype(F64)
        elif ty == "s32":
            x = np.stack(v, -1).view(I32).astype(F64)
        else:
            x = unpack(v, ty)
        return x.reshape(Wn, -1)[:, : R * C].reshape(Wn, R, C)

    def multiply(m: Machine, g: Group) -> None:
        Wn = len(g.lanes) // 32
        A, B = gather(m, g, ra, aty, M, K), gather(m, g, rb, bty, K, Nn)
        X = (np.matmul(A, B) + gather(m, g, rc, cty, M, Nn)).reshape(Wn, M * Nn)
        per = nel(dty)
        S = len(wd) * per
        e = (np.arange(32)[:, None] * S + np.arange(S)[None, :]) % (M * Nn)
        X = X[:, e]  # (W, 32, S)
        if dty == "f16":
            h = N.d2h(X)
            out = h[..., 0::2].astype(U32) | (h[..., 1::2].astype(U32) << U32(16))
        elif dty == "f32":
            out = N.canon32(X.astype(F32)).view(U32)
        elif dty == "s32":
            y = X.astype(I64)
            if satf:
                y = np.clip(y, -(2**31), 2**31 - 1)
            out = (y & 0xFFFFFFFF).astype(U32)
        else:
            out = np.ascontiguousarray(X).view(U64)
        for i, w in enumerate(wd):
            w(m, g.lsel, np.ascontiguousarray(out[..., i]).ravel())
        m.st.mma_flops += flops * Wn

    return multiply
