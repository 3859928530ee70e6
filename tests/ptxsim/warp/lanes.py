"""Votes, shuffles, matches and reductions across the lanes of a warp.

Builders return f(m, g) executed once all required lanes of every warp in g are present; g.lanes is sorted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array, Exec
from ..ops.context import I64, NPD, U32, Ctx

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group
    from ..machine.state import State


POISON = U32(0x7FBADBAD)
LANE = np.arange(32)


def pick(cx: Ctx, names: Iterable[str]) -> str:
    """the one modifier out of names (their order inside the opcode varies in hand written PTX)."""
    for x in cx.ins.parts[1:]:
        if x in names:
            return x
    raise cx.bad()


def b_shfl(cx: Ctx) -> Exec:
    ins = cx.ins
    mode = pick(cx, ("up", "down", "bfly", "idx"))
    d, a, b, c = ins.args[:4]
    d1, d2 = (d[1], d[2]) if d[0] == "pair" else (d, None)
    w1 = cx.wr(d1, "b32")
    w2 = cx.wr(d2, "pred") if d2 is not None else None
    ra, rb, rc = cx.rd(a, "b32"), cx.rd(b, "b32"), cx.rd(c, "b32")
    allsel = slice(None)

    def ex(m: Machine, g: Group) -> None:
        ln = g.lanes
        s = g.lsel
        lane = ln & 31
        bv = (rb(m, s) & U32(31)).astype(I64)
        cr = rc(m, s).astype(I64)
        cv, seg = cr & 31, (cr >> 8) & 31
        maxl = (lane & seg) | (cv & ~seg)
        minl = lane & seg
        if mode == "up":
            j = lane - bv
            pv = j >= maxl
        elif mode == "down":
            j = lane + bv
            pv = j <= maxl
        elif mode == "bfly":
            j = lane ^ bv
            pv = j <= maxl
        else:
            j = minl | (bv & ~seg)
            pv = j <= maxl
        j = np.where(pv, j, lane)
        full = ra(m, allsel)
        src = (ln & ~31) | j
        v = np.repeat(full, len(ln)) if len(full) == 1 else full[src]
        if len(ln) != m.L:
            act = np.zeros(m.L, bool)
            act[ln] = True
            ok = act[src]
            if not ok.all():
                v = np.where(ok, v, POISON)
                live = m.live[src[~ok]]
                if live.any():
                    m.warn(ins, "shfl from inactive lane", "source lane not participating; result poisoned")
        w1(m, s, v)
        if w2 is not None:
            w2(m, s, pv)

    return ex


def ballot(m: State, lanes: Array, p: Array | None) -> Array:
    """per-warp uint32 masks (array over warps) of lanes with p."""
    ls = lanes[p] if p is not None else lanes
    return np.bincount(ls >> 5, weights=m.onehot[ls], minlength=m.nw).astype(np.uint64).astype(U32)


def b_vote(cx: Ctx) -> Exec:
    ins = cx.ins
    mode = pick(cx, ("all", "any", "uni", "ballot"))
    d, a = ins.args[:2]
    w = cx.wr(d, "b32" if mode == "ballot" else "pred")
    r = cx.rd(a, "pred")

    def ex(m: Machine, g: Group) -> None:
        ln = g.lanes
        s = g.lsel
        p = np.broadcast_to(r(m, s), ln.shape)
        mm = members(g)
        bal = ballot(m, ln, p)[ln >> 5] & mm
        if mode == "ballot":
            w(m, s, bal)
            return
        pres = ballot(m, ln, None)[ln >> 5] & mm
        if mode == "all":
            w(m, s, bal == pres)
        elif mode == "any":
            w(m, s, bal != 0)
        else:
            w(m, s, (bal == pres) | (bal == 0))

    return ex


def b_activemask(cx: Ctx) -> Exec:
    w = cx.wr(cx.ins.args[0], "b32")

    def ex(m: Machine, g: Group) -> None:
        w(m, g.lsel, ballot(m, g.lanes, None)[g.lanes >> 5])

    return ex


def members(g: Group) -> Array:
    """The membermask of each lane; warp-synchronous instructions always have one."""
    assert g.mm is not None
    return g.mm


def _by_warp(g: Group) -> list[Array]:
    """iterate (positions in g.lanes) per distinct (warp, membermask)."""
    key = (g.lanes.astype(np.int64) >> 5 << 32) | np.broadcast_to(members(g), g.lanes.shape).astype(np.int64)
    o = np.argsort(key, kind="stable")
    ks = key[o]
    cut = np.flatnonzero(np.diff(ks)) + 1
    return np.split(o, cut)


def b_match(cx: Ctx) -> Exec:
    ins = cx.ins
    mode = pick(cx, ("any", "all"))
    ty = pick(cx, ("b32", "b64"))
    d, a = ins.args[:2]
    d1, d2 = (d[1], d[2]) if d[0] == "pair" else (d, None)
    w1 = cx.wr(d1, "b32")
    w2 = cx.wr(d2, "pred") if d2 is not None else None
    r = cx.rd(a, ty)

    def ex(m: Machine, g: Group) -> None:
        ln, s = g.lanes, g.lsel
        v = np.broadcast_to(r(m, s), ln.shape)
        out = np.zeros(len(ln), U32)
        pr = np.zeros(len(ln), bool)
        for pos in _by_warp(g):
            bits = U32(1) << (ln[pos] & 31).astype(U32)
            vv = v[pos]
            eq = vv[:, None] == vv[None, :]
            mk = (eq * bits[None, :]).sum(axis=1).astype(U32)
            if mode == "any":
                out[pos] = mk
            else:
                al = eq.all()
                out[pos] = bits.sum() if al else 0
                pr[pos] = al
        w1(m, s, out)
        if w2 is not None:
            w2(m, s, pr)

    return ex


def b_redux(cx: Ctx) -> Exec:
    ins = cx.ins
    op = pick(cx, ("add", "min", "max", "and", "or", "xor"))
    ty = ins.parts[-1]
    if ty == "f32" or any(x in ("abs", "NaN") for x in ins.parts):
        raise cx.bad()
    d, a = ins.args[:2]
    w, r = cx.wr(d, ty), cx.rd(a, ty)
    red = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[op]

    def ex(m: Machine, g: Group) -> None:
        ln, s = g.lanes, g.lsel
        v = np.broadcast_to(r(m, s), ln.shape)
        out = np.empty(len(ln), NPD[ty])
        for pos in _by_warp(g):
            out[pos] = red.reduce(v[pos], dtype=NPD[ty])
        w(m, s, out)

    return ex


def b_elect(cx: Ctx) -> Exec:
    d = cx.ins.args[0]
    d1, d2 = (d[1], d[2]) if d[0] == "pair" else (("sink",), d)
    w1, w2 = cx.wr(d1, "b32"), cx.wr(d2, "pred")

    def ex(m: Machine, g: Group) -> None:
        ln, s = g.lanes, g.lsel
        lead = np.zeros(len(ln), U32)
        pr = np.zeros(len(ln), bool)
        for pos in _by_warp(g):
            lead[pos] = ln[pos[0]] & 31
            pr[pos[0]] = True
        w1(m, s, lead)
        w2(m, s, pr)

    return ex
