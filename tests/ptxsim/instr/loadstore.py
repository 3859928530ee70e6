"""ld and st."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..aliases import Exec, Operand, Writer
from ..memory.addresses import UDT
from ..ops.context import NPD, Ctx
from ..parse.syntax import WIDTH
from .address import addr_reader, lanes_addr, memparts

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def b_ld(cx: Ctx) -> Exec:
    ins = cx.ins
    sp, vec, ty, strong, rest = memparts(cx)
    if rest:
        raise cx.bad(f"(modifier {rest})")
    d, a = ins.args[:2]
    dst = d[1] if d[0] == "vec" else [d]
    if len(dst) != vec:
        raise cx.bad("(vector size)")
    if ty == "b128":
        if vec != 1:
            raise cx.bad()
        s = cx.slot(dst[0][1])
        f = addr_reader(cx, a)
        spx = "global" if sp == "const" else sp

        def ex(m: Machine, g: Group) -> None:
            m.R[s][g.lsel] = m.load(spx, ins, g.lanes, lanes_addr(f, m, g), 8, 2, strong)

        return ex
    es = WIDTH[ty] // 8
    ws = [cx.wr(o, ty) for o in dst]
    dt = NPD[ty]
    if sp == "param":
        return b_ld_param(cx, a, ws, es, vec, dt, ty)
    f = addr_reader(cx, a)
    spx = "global" if sp == "const" else sp

    if vec == 1:
        w0 = ws[0]

        def ex(m: Machine, g: Group) -> None:
            v = m.load(spx, ins, g.lanes, lanes_addr(f, m, g), es, 1, strong)
            w0(m, g.lsel, v[:, 0].view(dt))
    else:

        def ex(m: Machine, g: Group) -> None:
            v = m.load(spx, ins, g.lanes, lanes_addr(f, m, g), es, vec, strong)
            for i, w in enumerate(ws):
                w(m, g.lsel, v[:, i].view(dt))

    return ex


def b_ld_param(cx: Ctx, a: Operand, ws: list[Writer], es: int, vec: int, dt: Any, ty: str) -> Exec:
    ins = cx.ins
    base, off = a[1], a[2]
    if base[0] == "sym":
        k, i, size = cx.prog.param_ref(cx, base[1])
        if off < 0 or off + es * vec > size:
            raise cx.bad(f"(parameter offset {off} outside {size} bytes)")
        if k == "k":
            o = i + off

            def kernel_param(m: Machine, g: Group) -> None:
                v = m.kparam[o : o + es * vec].copy().view(UDT[es])
                for j, w in enumerate(ws):
                    w(m, g.sel, v[j : j + 1].view(dt))

            return kernel_param

        def call_param(m: Machine, g: Group) -> None:
            b = np.ascontiguousarray(m.P[i][g.lsel, off : off + es * vec]).view(UDT[es])
            for j, w in enumerate(ws):
                w(m, g.lsel, b[:, j].view(dt))

        return call_param
    f = addr_reader(cx, a)

    def indirect(m: Machine, g: Group) -> None:
        v = m.load("kparam", ins, g.lanes, lanes_addr(f, m, g), es, vec)
        for j, w in enumerate(ws):
            w(m, g.lsel, v[:, j].view(dt))

    return indirect


def b_st(cx: Ctx) -> Exec:
    ins = cx.ins
    sp, vec, ty, strong, rest = memparts(cx)
    if rest:
        raise cx.bad(f"(modifier {rest})")
    a, v = ins.args[:2]
    src = v[1] if v[0] == "vec" else [v]
    if len(src) != vec:
        raise cx.bad("(vector size)")
    if ty == "b128":
        s = cx.slot(src[0][1])
        f = addr_reader(cx, a)

        def store_b128(m: Machine, g: Group) -> None:
            m.store(sp, ins, g.lanes, lanes_addr(f, m, g), 8, m.R[s][g.lsel], strong)

        return store_b128
    es = WIDTH[ty] // 8
    bt = f"b{WIDTH[ty]}"
    # a float literal keeps its own type, everything else is raw bits
    rs = [cx.rd(o, ty if o[0] in ("f32", "f64", "dec") else bt) for o in src]
    U = UDT[es]
    if sp == "param":
        base, off = a[1], a[2]
        if base[0] != "sym":
            raise cx.bad("(st.param address)")
        k, i, size = cx.prog.param_ref(cx, base[1])
        if k == "k":
            raise cx.bad("(store to kernel parameter)")
        if off < 0 or off + es * vec > size:
            raise cx.bad(f"(parameter offset {off} outside {size} bytes)")

        def store_param(m: Machine, g: Group) -> None:
            n = len(g.lanes)
            b = np.empty((n, vec), U)
            for j, r in enumerate(rs):
                b[:, j] = r(m, g.lsel).view(U)
            m.P[i][g.lsel, off : off + es * vec] = b.view(np.uint8).reshape(n, -1)

        return store_param
    if sp == "const":
        raise cx.bad("(store to const)")
    f = addr_reader(cx, a)

    def store(m: Machine, g: Group) -> None:
        n = len(g.lanes)
        b = np.empty((n, vec), U)
        for j, r in enumerate(rs):
            b[:, j] = r(m, g.lsel).view(U)
        m.store(sp, ins, g.lanes, lanes_addr(f, m, g), es, b, strong)

    return store
