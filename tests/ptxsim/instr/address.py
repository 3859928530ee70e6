"""Address operands, opcode modifiers of memory instructions, address conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array, Exec, Operand, Reader, Sel
from ..errors import ExecError
from ..memory.addresses import LOCAL_WIN, PARAM_WIN, SHARED_WIN
from ..ops.context import I64, NPD, U64, Ctx
from ..parse.syntax import WIDTH

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


SEMS = {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "mmio", "sc"}
SCOPES = {"cta", "cluster", "gpu", "sys", "gl"}
CACHE = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"}


def addr_reader(cx: Ctx, op: Operand) -> Reader:
    """f(m, sel) -> int64 raw addresses (shape (n,) or (1,))."""
    if op[0] != "addr":
        raise cx.bad("(address operand expected)")
    base, off = op[1], op[2]
    if base[0] == "reg":
        s = cx.slot(base[1])
        w = base[1].width
        if w == 64:
            if off:
                return lambda m, sel: m.R[s][sel].view(I64) + off
            return lambda m, sel: m.R[s][sel].view(I64)
        if w == 32:
            return lambda m, sel: (m.R[s][sel].astype(I64) + off) & 0xFFFFFFFF
        raise cx.bad("(address register width)")
    if base[0] == "imm":
        c = np.array([base[1] + off], I64)
        return lambda m, sel: c
    if base[0] == "sym":
        g = cx.prog.symbol(cx, base[1], off)
        if isinstance(g, int):
            c = np.array([g], I64)
            return lambda m, sel: c
        return lambda m, sel: g(m, sel).view(I64)
    raise cx.bad("(address form)")


def mach_addr(cx: Ctx, op: Operand, space: str) -> Reader:
    """address reader giving shared offsets for ldmatrix & co."""
    f = addr_reader(cx, op)
    if space == "shared":
        return f

    def g(m: Machine, sel: Sel) -> Array:
        a = f(m, sel)
        if ((a >> 32) != (SHARED_WIN >> 32)).any():
            m.fail(ExecError, cx.ins, None, "generic address does not point to shared memory")
        return a - SHARED_WIN

    return g


def memparts(cx: Ctx) -> tuple[str, int, str, bool, list[str]]:
    """(space, vec, ty, strong, extras) of ld/st/atom/red."""
    sp, vec, ty, strong = "generic", 1, "", False
    rest = []
    for x in cx.ins.parts[1:]:
        b = x.split("::")[0]
        if b in ("global", "shared", "local", "const", "param") and (
            x == b or x.split("::")[1] in ("cta", "cluster", "entry", "func")
        ):
            if x == "shared::cluster":
                raise cx.bad("(cluster shared memory)")
            sp = b
        elif x in ("v2", "v4", "v8"):
            vec = int(x[1])
        elif x in WIDTH:
            ty = x
        elif x in SEMS:
            strong = strong or x in ("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio", "sc")
        elif x in SCOPES or x in CACHE or x in ("L1", "L2", "unified") or b in ("L1", "L2"):
            pass
        else:
            rest.append(x)
    return sp, vec, ty, strong, rest


def lanes_addr(f: Reader, m: Machine, g: Group) -> Array:
    a = f(m, g.lsel)
    if len(a) != len(g.lanes):
        a = np.repeat(a, len(g.lanes))
    return a


def b_cvta(cx: Ctx) -> Exec:
    ins = cx.ins
    to = "to" in ins.parts
    sp = next(
        (x.split("::")[0] for x in ins.parts if x.split("::")[0] in ("global", "shared", "local", "const", "param")),
        None,
    )
    ty = ins.parts[-1]
    d, a = ins.args
    w = cx.wr(d, ty)
    base = {"shared": SHARED_WIN, "local": LOCAL_WIN, "param": PARAM_WIN}.get(sp or "", 0)
    aty = ty
    if a[0] == "reg" and a[1].width == 32 and ty == "u64":
        raise cx.bad()
    r = cx.rd(a, aty)
    U = NPD[ty]
    if base == 0:
        return lambda m, g: w(m, g.sel, r(m, g.sel))
    if to:

        def ex(m: Machine, g: Group) -> None:
            v = r(m, g.sel)
            w(m, g.sel, np.where(v == 0, v, v - U(base)))

        return ex
    return lambda m, g: w(m, g.sel, r(m, g.sel) + U(base))


def b_isspacep(cx: Ctx) -> Exec:
    sp = cx.ins.parts[1].split("::")[0]
    d, a = cx.ins.args
    w, r = cx.wr(d, "pred"), cx.rd(a, "u64" if a[0] != "reg" or a[1].width == 64 else "u32")
    win = {"shared": SHARED_WIN, "local": LOCAL_WIN, "param": PARAM_WIN}

    def ex(m: Machine, g: Group) -> None:
        h = r(m, g.sel).astype(U64) >> U64(32)
        if sp in win:
            w(m, g.sel, h == U64(win[sp] >> 32))
        elif sp == "global":
            w(m, g.sel, ~np.isin(h, [U64(v >> 32) for v in win.values()]))
        else:
            w(m, g.sel, np.zeros(1, bool))

    return ex
