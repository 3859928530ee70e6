"""The SIMT scheduler: groups of lanes with one pc run until they diverge, wait or exit."""

from __future__ import annotations

import numpy as np

from ..errors import ExecError, PtxSimError, StepLimitError
from .barriers import Barriers
from .options import ALLSEL, Group


class Machine(Barriers):
    """Runs one chunk of CTAs to completion."""

    def run(self) -> None:
        self.enqueue(self.prog.entry_pc, 0, np.flatnonzero(self.live))
        force = None
        with np.errstate(all="ignore"):
            while self.nlive:
                if not self.groups:
                    self.deadlock()
                k = force if force is not None and force in self.groups else min(self.groups)
                force = None
                g = self.groups.pop(k)
                try:
                    force = self.exec_group(g)
                except PtxSimError as e:
                    if "line" in e.info:
                        raise
                    ins = self.code[self.cur]
                    e.info.update(kernel=self.prog.kernel.demangled, line=ins.line, text=ins.text, loc=ins.loc)
                    e.args = (f"{self.where(ins)}: {e.args[0]}",)
                    raise
                except Exception as e:  # a bug of the emulator: say where
                    ins = self.code[self.cur]
                    raise ExecError(
                        f"{self.where(ins)}: internal error {type(e).__name__}: {e}",
                        kernel=self.prog.kernel.demangled,
                        line=ins.line,
                        text=ins.text,
                    ) from e
        if self.cp_queue:
            self._cp_leftover()
        st = self.st
        st.warp_instr += np.array(self.wi, np.int64)
        st.thread_instr += np.array(self.ti, np.int64)
        st.steps += self.steps

    def exec_group(self, g: Group) -> tuple[int, int] | None:
        n = len(g.lanes)
        if n == self.nlive:
            g.full = True
            g.sel = ALLSEL
            g.lsel = ALLSEL if n == self.L else g.lanes
        else:
            g.full = False
            g.sel = g.lsel = g.lanes
        lw = g.lanes >> 5
        nw = g.nw = int(np.count_nonzero(lw[1:] != lw[:-1])) + 1
        H, wi, ti = self.H, self.wi, self.ti
        pc, depth = g.pc, g.depth
        trace = self.opts.trace
        budget = self.opts.quantum
        ver = -1
        lim = 1 << 60
        while True:
            if ver != self.gver:
                ver = self.gver
                lim = 1 << 60
                for d, p in self.groups:
                    if d == -depth and pc < p < lim:
                        lim = p
                if (-depth, pc) in self.groups:
                    self.enqueue(pc, depth, g.lanes)
                    return None
            kind, fn = H[pc]
            self.cur = pc
            wi[pc] += nw
            ti[pc] += n
            self.steps += 1
            if trace is not None:
                trace(self.code[pc], g.lanes)
            if kind == 0:
                fn(self, g)
                pc += 1
                if pc >= lim:
                    self.enqueue(pc, depth, g.lanes)
                    return None
                continue
            g.pc = pc
            npc = fn(self, g)
            if npc < 0:
                if self.want_yield:
                    self.want_yield = False
                return None
            if npc <= pc:
                ver = -1  # backward transfer: recompute the merge limit
                budget -= 16
            elif npc >= lim:
                self.enqueue(npc, depth, g.lanes)
                return None
            budget -= 1
            pc = npc
            if (budget <= 0 or self.want_yield) and self.groups:
                self.want_yield = False
                # fairness: let another group run
                ks = sorted(self.groups)
                me = (-depth, pc)
                nxt = next((k for k in ks if k > me), ks[0])
                self.enqueue(pc, depth, g.lanes)
                if nxt == me:
                    return None
                return nxt
            self.want_yield = False
            if self.steps > self.opts.max_steps:
                self.fail(
                    StepLimitError,
                    self.code[pc],
                    int(g.lanes[0]),
                    f"more than max_steps={self.opts.max_steps} emulator steps (endless loop?)",
                )
