"""atom and red."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec, Sel
from ..errors import ExecError, UnsupportedError
from ..machine.options import ALLSEL
from ..memory.addresses import SPACE_OF, UDT
from ..ops.context import F32, F64, NPD, U16, U32, U64, Ctx, lift2
from ..ops.floats import half_fn
from ..parse.syntax import WIDTH
from .address import addr_reader, lanes_addr, memparts

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def atom_fn(cx: Ctx, op: str, ty: str, glob: bool) -> Callable[..., Array]:
    """f(old, b, c) -> new for one atomic on raw unsigned arrays."""
    w = WIDTH[ty]
    U = UDT[w // 8]
    dt = NPD[ty]
    if op == "cas":

        def cas(o: Array, b: Array, c: Array) -> Array:
            return np.where(o == b, c, o)

        return cas
    if op == "exch":
        return lambda o, b, c: b
    if op in ("and", "or", "xor"):
        table: dict[str, Callable[..., Array]] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
        bits = table[op]

        def bitwise(o: Array, b: Array, c: Array | None) -> Array:
            return bits(o, b)

        return bitwise
    if op == "inc":
        return lambda o, b, c: np.where(o >= b, U(0), o + U(1))
    if op == "dec":
        return lambda o, b, c: np.where((o == 0) | (o > b), b, o - U(1))
    if ty in ("f16", "bf16", "f16x2", "bf16x2"):
        base = ty.replace("x2", "")
        if op == "add":
            h = half_fn("add", base, False, False, False)
        else:
            cv = N.h2f if base == "f16" else N.b2f
            infe = U16(0x7C00 if base == "f16" else 0x7F80)

            def h(x: Array, y: Array) -> Array:
                nx, ny = (x & U16(0x7FFF)) > infe, (y & U16(0x7FFF)) > infe
                t = (cv(x) < cv(y)) if op == "min" else (cv(x) > cv(y))
                return np.where(nx, y, np.where(ny, x, np.where(t, x, y)))

        f = lift2(h) if ty.endswith("x2") else h
        return lambda o, b, c: f(o, b)
    if op == "add":
        if ty == "f32":
            if glob:
                return lambda o, b, c: N.ftz32(
                    N.canon32(N.ftz32(np.ascontiguousarray(o).view(F32)) + N.ftz32(np.ascontiguousarray(b).view(F32)))
                ).view(U32)
            return lambda o, b, c: N.canon32(
                np.ascontiguousarray(o).view(F32) + np.ascontiguousarray(b).view(F32)
            ).view(U32)
        if ty == "f64":
            return lambda o, b, c: (o.view(F64) + b.view(F64)).view(U64)
        return lambda o, b, c: o + b
    if op in ("min", "max"):
        if ty in ("f32", "f64"):
            raise cx.bad()
        pick: Callable[..., Array] = np.minimum if op == "min" else np.maximum
        return lambda o, b, c: pick(o.view(dt), b.view(dt)).view(U)
    raise cx.bad(f"(atomic {op})")


def atomic_apply(view: Array, idx: Array, b: Array, c: Array | None, f: Callable[..., Array], need_old: bool) -> Array:
    """sequentially consistent application in lane order; returns old values."""
    n = len(idx)
    o = np.argsort(idx, kind="stable")
    si = idx[o]
    new = np.empty(n, bool)
    new[0] = True
    new[1:] = si[1:] != si[:-1]
    if new.all():
        old = view[idx].copy()
        view[idx] = f(old, b, c)
        return old
    start = np.flatnonzero(new)
    rank = np.arange(n) - np.repeat(start, np.diff(np.append(start, n)))
    old = np.empty(n, view.dtype)
    mx = int(rank.max()) + 1
    ro = np.argsort(rank, kind="stable")
    cuts = np.searchsorted(rank[ro], np.arange(1, mx))
    for part in np.split(ro, cuts):
        p = o[part]
        i = idx[p]
        ov = view[i].copy()
        old[p] = ov
        view[i] = f(ov, b[p], None if c is None else c[p])
    return old


def b_atom(cx: Ctx) -> Exec:
    ins = cx.ins
    red = ins.parts[0] == "red"
    if red and ins.parts[1] == "async":
        raise cx.bad()
    sp, vec, ty, _strong, rest = memparts(cx)
    rest = [x for x in rest if x != "noftz"]
    if len(rest) != 1 or sp not in ("generic", "global", "shared"):
        raise cx.bad(f"(modifiers {rest})")
    op = rest[0]
    if ty == "b128":
        raise cx.bad("(b128 atomics)")
    if red:
        d, (a, *vals) = None, ins.args
    else:
        d, a, *vals = ins.args
    if vec == 1:
        vals = vals[: 2 if op == "cas" else 1]
        rs = [[cx.rd(vals[0], ty)]]
        rc = cx.rd(vals[1], ty) if op == "cas" else None
        ws = [cx.wr(d, ty)] if d is not None else [None]
    else:
        rs = [[cx.rd(o, ty) for o in vals[0][1]]]
        rc = None
        ws = [cx.wr(o, ty) for o in d[1]] if d is not None else [None] * vec
    es = WIDTH[ty] // 8
    U = UDT[es]
    f_g, f_s = atom_fn(cx, op, ty, True), atom_fn(cx, op, ty, False)
    fa = addr_reader(cx, a)
    dt = NPD[ty]

    def one(
        m: Machine, lanes: Array, addr: Array, space: str, bs: list[Array], c: Array | None, olds: list[Array], pos: Sel
    ) -> None:
        size = es * vec
        if space == "shared":
            flat = m.sh.check(ins, lanes, addr, size, "rw", atomic=True)
            v = m.sh.view(es)
            for j in range(vec):
                olds[j][pos] = atomic_apply(v, flat // es + j, bs[j], c, f_s, not red)
        elif space == "global":
            for r, q, off in m.gaccess(ins, lanes, addr, size, "a", True):
                if r.base % es:
                    raise UnsupportedError("atomics on a buffer with unaligned base")
                v = r.view(es)
                for j in range(vec):
                    if q is None:
                        olds[j][pos] = atomic_apply(v, off // es + j, bs[j], c, f_g, not red)
                    else:
                        olds[j][pos[q] if isinstance(pos, np.ndarray) else q] = atomic_apply(
                            v, off // es + j, bs[j][q], None if c is None else c[q], f_g, not red
                        )
        else:
            m.fail(ExecError, ins, int(lanes[0]), f"atomic operation on {space} memory")

    def ex(m: Machine, g: Group) -> None:
        ln = g.lanes
        n = len(ln)
        addr = lanes_addr(fa, m, g)
        bs = [np.ascontiguousarray(np.broadcast_to(r(m, g.lsel), (n,))).view(U) for r in rs[0]]
        c = None
        if rc is not None:
            c = np.ascontiguousarray(np.broadcast_to(rc(m, g.lsel), (n,))).view(U)
        olds = [np.empty(n, U) for _ in range(vec)]
        if sp != "generic":
            one(m, ln, addr, sp, bs, c, olds, ALLSEL)
        else:
            h = addr >> 32
            key = np.where(np.isin(h, list(SPACE_OF)), h, 0)
            for k in np.unique(key):
                s2, base = SPACE_OF.get(int(k), ("global", 0))
                pos = np.flatnonzero(key == k)
                one(m, ln[pos], addr[pos] - base, s2, [x[pos] for x in bs], None if c is None else c[pos], olds, pos)
        for j in range(vec):
            w = ws[j]
            if w is not None:
                w(m, g.lsel, olds[j].view(dt))

    return ex
