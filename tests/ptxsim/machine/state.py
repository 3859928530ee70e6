"""Registers, special registers, shared and local memory of one chunk of CTAs, and its diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..aliases import Array, Handler
from ..errors import PtxSimError, UnsupportedError
from ..memory import Memory
from ..memory.addresses import SHARED_START
from ..memory.shared import SharedMem
from ..ops.context import STORE, U32, U64, store_width
from ..parse.syntax import Ins
from ..stats import Stats
from ..warp.lanes import ballot
from .options import Bar, Dims, Group, MBar, Options

if TYPE_CHECKING:
    from ..program import Program


def register_bytes(prog: Program) -> int:
    """Memory of a lane's registers."""
    return sum(1 if r.width == 1 else 16 if r.width == 128 else store_width(r.width) // 8 for r in prog.regs)


class State:
    """State of one chunk of CTAs."""

    def __init__(
        self,
        prog: Program,
        handlers: list[Handler],
        ctas: Sequence[int],
        grid: Dims,
        block: Dims,
        kparam: Array,
        mem: Memory,
        opts: Options,
        shared_bytes: int,
        stats: Stats,
        res: dict[str, Any],
    ) -> None:
        self.prog, self.code, self.H = prog, prog.code, handlers
        self.mem, self.opts, self.st, self.res = mem, opts, stats, res
        self.stats_on = opts.stats
        self.grid, self.block = grid, block
        nt = block[0] * block[1] * block[2]
        self.nt = nt
        self.T = T = (nt + 31) // 32 * 32
        self.ncta = len(ctas)
        self.L = L = T * self.ncta
        self.nw = L // 32
        self.ctas = np.asarray(ctas, np.int64)
        lane = np.arange(L)
        self.cta_of = lane // T
        tid = lane % T
        self.live = tid < nt
        self.nlive = int(self.live.sum())
        self.onehot = 2.0 ** (lane & 31)
        self.livemask = ballot(self, np.flatnonzero(self.live), None)
        self.CC = np.zeros(L, bool)
        self.kparam = kparam
        self.shared_bytes = shared_bytes
        self.coop_ws = res.get("_coop", 0)
        # registers
        self.R: list[Array] = []
        for r in prog.regs:  # as `register_bytes` counts them
            if r.width == 128:
                a: Array = np.full((L, 2), 0xA5A5A5A5A5A5A5A5, U64)
            elif r.width == 1:
                a = np.zeros(L, bool)
            else:
                a = np.empty(L, STORE[store_width(r.width)])
                a.fill(0xA5A5A5A5A5A5A5A5 & ((1 << store_width(r.width)) - 1))
            self.R.append(a)
        self.P = [np.full((L, max(1, v.size)), 0xFF, np.uint8) for _, v in prog.pinfo]
        self._special: dict[str, Array] = {}
        self._init_special(lane, tid)
        self.lbase = np.zeros(L, np.int64)
        fr = prog.finfo[prog.kernel.name].frame
        self.lcap = max(16, fr)
        self.local = np.full(L * self.lcap, 0xFF, np.uint8)
        self.rstack: list[Array] = []  # per depth: pc of the call each lane came from
        self.saves: dict[tuple[str, int], list[Array]] = {}  # frames of recursive functions
        # shared
        lay = list(prog.shared_vars)
        if shared_bytes:
            lay.append((prog.dyn_off, shared_bytes, "dynamic"))
        end = max([SHARED_START] + [o + s for o, s, _ in lay])
        self.sh = SharedMem(self, end, lay, opts, prog.granule)
        self.race = self.sh.race if prog.uses_shared else None
        if not prog.uses_shared:
            self.sh.race = None
        # scheduling
        self.groups: dict[tuple[int, int], Group] = {}  # (-depth, pc) -> runnable lanes
        self.gver = 0
        self.parked: dict[tuple[int, int], Array] = {}  # (depth, pc) -> lanes waiting for their membermask
        self.bws_wait = np.zeros(L, bool)
        self.bws_pc = np.zeros(L, np.int64)
        self.bws_mm = np.zeros(L, np.int64)
        self.bws_depth = np.zeros(L, np.int64)
        self.nbws = 0
        self.bars: dict[tuple[int, int], Bar] = {}  # (cta, barrier id)
        self.nbar = 0
        self.mbars: dict[tuple[int, int], MBar] = {}  # (cta, shared offset)
        self.want_yield = False
        self.cur = 0
        self.steps = 0
        # cp.async
        self.cp_queue: list[list[Any]] = []
        self.cp_group = np.zeros(L, np.int64)
        self.clock = 0
        self.wi = [0] * len(self.code)
        self.ti = [0] * len(self.code)

    def let_go(self) -> None:
        """Frees the chunk now: its parts refer to each other, and the garbage collector comes when it comes."""
        self.__dict__.clear()

    def _init_special(self, lane: Array, tid: Array) -> None:
        bx, by, bz = self.block
        gx, gy, gz = self.grid
        c = self.ctas[self.cta_of]

        def u(a: Any) -> Array:
            return np.asarray(a).astype(U32)

        def one(v: int) -> Array:
            return np.array([v], U32)

        S = self._special
        S["%tid.x"], S["%tid.y"], S["%tid.z"] = u(tid % bx), u(tid // bx % by), u(tid // (bx * by))
        S["%ntid.x"], S["%ntid.y"], S["%ntid.z"] = one(bx), one(by), one(bz)
        S["%ctaid.x"], S["%ctaid.y"], S["%ctaid.z"] = u(c % gx), u(c // gx % gy), u(c // (gx * gy))
        S["%nctaid.x"], S["%nctaid.y"], S["%nctaid.z"] = one(gx), one(gy), one(gz)
        S["%laneid"] = u(lane & 31)
        S["%warpid"] = u(tid >> 5)
        S["%nwarpid"] = one(64)
        S["%smid"] = u(c % 108)
        S["%nsmid"] = one(108)
        S["%gridid"] = one(1)
        eq = np.int64(1) << (lane & 31)
        S["%lanemask_eq"] = u(eq)
        S["%lanemask_lt"] = u(eq - 1)
        S["%lanemask_le"] = u(eq * 2 - 1)
        S["%lanemask_gt"] = u(0xFFFFFFFF & ~(eq * 2 - 1))
        S["%lanemask_ge"] = u(0xFFFFFFFF & ~(eq - 1))
        S["%dynamic_smem_size"] = one(self.shared_bytes)
        S["%total_smem_size"] = one(self.shared_bytes + self.prog.static_bytes + SHARED_START)
        S["%is_explicit_cluster"] = one(0)
        for d in "xyz":
            S["%clusterid." + d] = S["%ctaid." + d]
            S["%nclusterid." + d] = S["%nctaid." + d]
            S["%cluster_ctaid." + d] = one(0)
            S["%cluster_nctaid." + d] = one(1)
        S["%cluster_ctarank"], S["%cluster_nctarank"] = one(0), one(1)

    def special(self, n: str) -> Array:
        a = self._special.get(n)
        if a is not None:
            return a
        if n in ("%clock", "%clock64", "%globaltimer", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"):
            v = self.steps * (1 if "clock" in n else 10)
            if n.endswith("_hi"):
                v >>= 32
            return np.array([v], U64)
        if n.startswith("%envreg"):
            # cooperative launches: envreg1:envreg2 hold the address of the grid barrier workspace
            v = {"%envreg1": self.coop_ws >> 32, "%envreg2": self.coop_ws & 0xFFFFFFFF}.get(n, 0)
            return np.array([v], U32)
        raise UnsupportedError(f"special register {n} is not supported")

    def tname(self, lane: int) -> str:
        cta = int(self.ctas[lane // self.T])
        t = lane % self.T
        gx, gy, _ = self.grid
        bx, by, _ = self.block
        return (
            f"thread ({t % bx},{t // bx % by},{t // (bx * by)}) of CTA ({cta % gx},{cta // gx % gy},{cta // (gx * gy)})"
        )

    def where(self, ins: Ins) -> str:
        loc = ""
        if ins.loc:
            loc = f" (source {self.prog.module.parsed.files.get(ins.loc[0], ins.loc[0])}:{ins.loc[1]})"
        return f"kernel {self.prog.kernel.demangled}: PTX line {ins.line}{loc} [{ins.text}]"

    def fail(self, cls: type[PtxSimError], ins: Ins, lane: int | None, msg: str, **kw: Any) -> NoReturn:
        t = "" if lane is None else f", {self.tname(lane)}"
        info = dict(kernel=self.prog.kernel.demangled, line=ins.line, text=ins.text, loc=ins.loc, **kw)
        if lane is not None:
            info["cta"] = int(self.ctas[lane // self.T])
            info["tid"] = int(lane % self.T)
        raise cls(f"{self.where(ins)}{t}: {msg}", **info)

    def warn(self, ins: Ins, kind: str, msg: str) -> None:
        w = self.res["_warn"]
        k = (kind, ins.line)
        if k in w:
            w[k][1] += 1
        elif len(w) < self.opts.max_warnings:
            w[k] = [f"{kind} at PTX line {ins.line} [{ins.text}]: {msg}", 1]

    def enqueue(self, pc: int, depth: int, lanes: Array) -> None:
        if len(lanes) == 0:
            return
        k = (-depth, pc)
        g = self.groups.get(k)
        if g is None:
            self.groups[k] = Group(pc, depth, lanes)
        else:
            a = np.concatenate([g.lanes, lanes])
            a.sort()
            self.groups[k] = Group(pc, depth, a)
        self.gver += 1
