"""Instruction -> handler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Exec, Handler
from ..machine.options import Group
from ..ops.context import U64, Ctx
from ..ops.table import ALU
from ..warp.lanes import b_activemask, b_elect, b_match, b_redux, b_shfl, b_vote
from ..warp.matrix import b_ldmatrix, b_mma, b_movmatrix
from ..warp.wmma import b_wmma
from .address import b_cvta, b_isspacep
from .atomics import b_atom
from .control import b_bra, b_brx, b_call, b_jump, b_ret, b_trap, predicate
from .copies import b_cp, b_mbarrier
from .loadstore import b_ld, b_st
from .sync import b_bar, wsync

if TYPE_CHECKING:
    from ..machine import Machine


NOPS = {
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "griddepcontrol",
    "membar",
    "fence",
    "pmevent",
    "brkpt",
    "setmaxnreg",
}


def guard(cx: Ctx, ex: Exec) -> Exec:
    pr = predicate(cx)
    if pr is None:
        return ex

    def f(m: Machine, g: Group) -> None:
        p = pr(m, g.lsel)
        n = np.count_nonzero(p)
        if n == len(p):
            ex(m, g)
        elif n:
            ex(m, Group(g.pc, g.depth, g.lanes[p]))

    return f


def build(cx: Ctx) -> Handler:
    ins = cx.ins
    op = ins.parts[0]
    if op in ALU:
        return 0, guard(cx, ALU[op](cx))
    if op in ("ld", "ldu"):
        return 0, guard(cx, b_ld(cx))
    if op == "st":
        return 0, guard(cx, b_st(cx))
    if op in ("atom", "red"):
        return 0, guard(cx, b_atom(cx))
    if op == "bra":
        return b_bra(cx)
    if op == "ptxsim_jump":
        return b_jump(cx)
    if op == "brx":
        return b_brx(cx)
    if op in ("ret", "exit"):
        return b_ret(cx)
    if op == "call":
        return b_call(cx)
    if op == "trap":
        return b_trap(cx)
    if op in ("bar", "barrier"):
        return b_bar(cx)
    if op == "cvta":
        return 0, guard(cx, b_cvta(cx))
    if op == "isspacep":
        return 0, guard(cx, b_isspacep(cx))
    if op == "cp":
        return 0, guard(cx, b_cp(cx))
    if op == "mbarrier":
        return 0, guard(cx, b_mbarrier(cx))
    if op == "shfl":
        if "sync" not in ins.parts:
            raise cx.bad()
        return wsync(cx, b_shfl(cx), cx.rd(ins.args[4], "b32"), False, True)
    if op == "vote":
        if "sync" not in ins.parts:
            raise cx.bad()
        return wsync(cx, b_vote(cx), cx.rd(ins.args[2], "b32"), False, False)
    if op == "match":
        return wsync(cx, b_match(cx), cx.rd(ins.args[2], "b32"), False, False)
    if op == "redux":
        return wsync(cx, b_redux(cx), cx.rd(ins.args[2], "b32"), False, False)
    if op == "elect":
        return wsync(cx, b_elect(cx), cx.rd(ins.args[1], "b32"), False, False)
    if op == "activemask":
        return 0, guard(cx, b_activemask(cx))
    if op in ("ldmatrix", "stmatrix"):
        return wsync(cx, b_ldmatrix(cx), None, True, False)
    if op == "movmatrix":
        return wsync(cx, b_movmatrix(cx), None, True, False)
    if op == "mma":
        return wsync(cx, b_mma(cx), None, True, False)
    if op == "wmma":
        return wsync(cx, b_wmma(cx), None, True, False)
    if op == "nanosleep":

        def ex(m: Machine, g: Group) -> None:
            m.want_yield = True

        return 0, guard(cx, ex)
    if op == "createpolicy":
        w = cx.wr(ins.args[0], "b64")
        return 0, guard(cx, lambda m, g: w(m, g.sel, np.zeros(1, U64)))
    if op == "mapa" or op == "getctarank":
        raise cx.bad("(clusters)")
    if op in NOPS:
        return 0, (lambda m, g: None)
    raise cx.bad()
