"""Branches, calls, returns and traps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array, Handler, Operand, Reader
from ..errors import ExecError, TrapError
from ..ops.context import I64, Ctx
from .builtins import builtin

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group
    from ..program import FInfo


def predicate(cx: Ctx) -> Reader | None:
    ins = cx.ins
    if ins.pred is None:
        return None
    s = cx.slot(ins.pred)
    if ins.neg:
        return lambda m, lanes: ~m.R[s][lanes]
    return lambda m, lanes: m.R[s][lanes]


def b_bra(cx: Ctx) -> Handler:
    ins = cx.ins
    t = ins.target
    pr = predicate(cx)
    if pr is None:
        return 1, lambda m, g: t

    def h(m: Machine, g: Group) -> int:
        p = pr(m, g.lsel)
        n = np.count_nonzero(p)
        if n == len(p):
            return t
        if n == 0:
            return g.pc + 1
        q = ~p
        a, b = g.lanes[p], g.lanes[q]
        m.enqueue(t, g.depth, a)
        m.enqueue(g.pc + 1, g.depth, b)
        m.st.divergent_branches += len(np.intersect1d(a >> 5, b >> 5))
        return -1

    return 1, h


def b_jump(cx: Ctx) -> Handler:
    t = cx.ins.target

    def h(m: Machine, g: Group) -> int:
        m.wi[g.pc] -= g.nw
        m.ti[g.pc] -= len(g.lanes)
        return t

    return 1, h


def b_brx(cx: Ctx) -> Handler:
    ins = cx.ins
    r = cx.rd(ins.args[0], "u32")
    tg = np.array(ins.target, I64)
    pr = predicate(cx)

    def h(m: Machine, g: Group) -> int:
        lanes = g.lanes
        if pr is not None:
            p = pr(m, lanes)
            m.enqueue(g.pc + 1, g.depth, lanes[~p])
            lanes = lanes[p]
            if not len(lanes):
                return -1
        i = r(m, lanes).astype(I64)
        if len(i) != len(lanes):
            i = np.repeat(i, len(lanes))
        if (i >= len(tg)).any():
            j = int(np.argmax(i >= len(tg)))
            m.fail(ExecError, ins, int(lanes[j]), f"brx.idx index {int(i[j])} out of range ({len(tg)} targets)")
        t = tg[i]
        u = np.unique(t)
        if len(u) > 1:
            m.st.divergent_branches += 1
        for x in u:
            m.enqueue(int(x), g.depth, lanes[t == x])
        return -1

    return 1, h


def b_ret(cx: Ctx) -> Handler:
    ins = cx.ins
    pr = predicate(cx)
    is_exit = ins.parts[0] == "exit"
    fi = cx.prog.finfo[ins.func.name]

    def h(m: Machine, g: Group) -> int:
        lanes = g.lanes
        if pr is not None:
            p = pr(m, lanes)
            if not p.any():
                return g.pc + 1
            if not p.all():
                m.enqueue(g.pc + 1, g.depth, lanes[~p])
            lanes = lanes[p]
        if is_exit or g.depth == 0:
            m.exit_lanes(lanes)
            return -1
        d = g.depth
        site = m.rstack[d - 1][lanes]
        for s in np.unique(site):
            ls = lanes[site == s]
            call = cx.prog.calls[int(s)]
            vals = [m.P[fi.pv[id(v)]][ls] for v in fi.f.rets]
            if fi.recursive:
                frame_restore(m, fi, d, ls)
            for (di, sz), v in zip(call[0], vals, strict=False):
                m.P[di][ls, : min(sz, v.shape[1])] = v[:, :sz]
            m.lbase[ls] -= call[1]
            m.enqueue(int(s) + 1, d - 1, ls)
        return -1

    return 1, h


def frame_arrays(m: Machine, fi: FInfo) -> list[Array]:
    return [m.R[fi.rb + i] for i in range(fi.nregs)] + [m.P[i] for i in fi.pv.values()]


def frame_save(m: Machine, fi: FInfo, depth: int, ls: Array) -> None:
    k = (fi.f.name, depth)
    sv = m.saves.get(k)
    cur = frame_arrays(m, fi)
    if sv is None:
        sv = m.saves[k] = [np.zeros_like(a) for a in cur]
    for a, b in zip(sv, cur, strict=False):
        a[ls] = b[ls]


def frame_restore(m: Machine, fi: FInfo, depth: int, ls: Array) -> None:
    sv = m.saves[(fi.f.name, depth)]
    for a, b in zip(frame_arrays(m, fi), sv, strict=False):
        a[ls] = b[ls]


def b_call(cx: Ctx) -> Handler:
    ins = cx.ins
    prog = cx.prog
    pr = predicate(cx)
    args = list(ins.args)
    rets = []
    if args and args[0][0] == "list":
        rets = args.pop(0)[1]
    tgt = args.pop(0)
    params = []
    if args and args[0][0] == "list":
        params = args.pop(0)[1]
    my = prog.finfo[ins.func.name]

    def ref(o: Operand) -> tuple[int, int]:
        if o[0] != "sym":
            raise cx.bad("(register call arguments)")
        k, i, s = prog.param_ref(cx, o[1])
        if k != "p":
            raise cx.bad("(kernel parameter as call argument)")
        return i, s

    pin = [ref(o) for o in params]
    pout = [ref(o) for o in rets]
    prog.calls[ins.pc] = (pout, my.frame)

    def enter(m: Machine, g: Group, lanes: Array, fi: FInfo) -> None:
        d = g.depth
        while len(m.rstack) <= d:
            m.rstack.append(np.zeros(m.L, np.int64))
        if d > 2000:
            m.fail(ExecError, ins, int(lanes[0]), "call depth exceeds 2000")
        m.rstack[d][lanes] = ins.pc
        vals = [m.P[i][lanes] for i, _ in pin]
        if fi.recursive:
            frame_save(m, fi, d + 1, lanes)
        for v, p in zip(vals, fi.f.params, strict=False):
            dst = m.P[fi.pv[id(p)]]
            n = min(dst.shape[1], v.shape[1])
            dst[lanes, :n] = v[:, :n]
        m.lbase[lanes] += my.frame
        top = int(m.lbase[lanes].max()) + fi.frame
        if top > m.lcap:
            nc = max(top, m.lcap * 2)
            nl = np.full((m.L, nc), 0xFF, np.uint8)
            nl[:, : m.lcap] = m.local.reshape(m.L, m.lcap)
            m.local, m.lcap = nl.reshape(-1), nc
        m.enqueue(fi.base, d + 1, lanes)

    def pre(m: Machine, g: Group) -> Array:
        lanes = g.lanes
        if pr is not None:
            p = pr(m, lanes)
            m.enqueue(g.pc + 1, g.depth, lanes[~p])
            lanes = lanes[p]
        return lanes

    if tgt[0] == "sym":
        name = tgt[1]
        fn = prog.module.funcs.get(name)
        if fn is None:
            raise cx.bad(f"(unknown function {name})")
        if not fn.defined:
            return builtin(cx, name, pin, pout, pr)
        fi = prog.finfo[fn.name]

        def direct(m: Machine, g: Group) -> int:
            lanes = pre(m, g)
            if len(lanes):
                enter(m, g, lanes, fi)
            return -1

        return 1, direct
    r = cx.rd(tgt, "u64")

    def indirect(m: Machine, g: Group) -> int:
        lanes = pre(m, g)
        if not len(lanes):
            return -1
        a = np.broadcast_to(r(m, lanes), lanes.shape)
        for x in np.unique(a):
            fn = prog.module.func_by_addr.get(int(x))
            if fn is None or fn.name not in prog.finfo:
                m.fail(
                    ExecError,
                    ins,
                    int(lanes[int(np.argmax(a == x))]),
                    f"indirect call to {int(x):#x}, which is not a known device function",
                )
            enter(m, g, lanes[a == x], prog.finfo[fn.name])
        return -1

    return 1, indirect


def b_trap(cx: Ctx) -> Handler:
    ins = cx.ins
    pr = predicate(cx)

    def h(m: Machine, g: Group) -> int:
        lanes = g.lanes
        if pr is not None:
            lanes = lanes[pr(m, lanes)]
            if not len(lanes):
                return g.pc + 1
        m.fail(TrapError, ins, int(lanes[0]), "trap executed")

    return 1, h
