"""CTA barriers, bar.warp.sync, exiting threads and the deadlock report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np

from ..aliases import Array
from ..errors import BarrierDivergenceError, DeadlockError
from ..parse.syntax import Ins
from ..warp.lanes import ballot
from .copies import Copies


class Barriers(Copies):
    """Arrival counting of named barriers and warp barriers."""

    def exit_lanes(self, lanes: Array) -> None:
        self.live[lanes] = False
        self.nlive -= len(lanes)
        ws = np.unique(lanes >> 5)
        for w in ws:
            b = self.live[w * 32 : w * 32 + 32]
            self.livemask[w] = int(self.onehot[w * 32 : w * 32 + 32][b].sum())
        self.gver += 1
        if self.parked:
            for k in list(self.parked):
                ls = self.parked[k]
                hit = np.isin(ls >> 5, ws)
                if hit.any():
                    rest = ls[~hit]
                    if len(rest):
                        self.parked[k] = rest
                    else:
                        del self.parked[k]
                    self.enqueue(k[1], k[0], ls[hit])
        if self.nbws:
            self.bws_release(ws)
        if self.nbar:
            for c in np.unique(self.cta_of[lanes]):
                for k in [k for k in self.bars if k[0] == c]:
                    self.bar_check(*k)

    def bws_release(self, warps: Array) -> None:
        mask = self.bws_wait & np.isin(np.arange(self.L) >> 5, warps)
        ls = np.flatnonzero(mask)
        if not len(ls):
            return
        arr = ballot(self, ls, None)
        w = ls >> 5
        need = self.bws_mm[ls] & self.livemask[w]
        ready = (need & ~arr[w].astype(np.int64)) == 0
        go = ls[ready]
        if not len(go):
            return
        self.bws_wait[go] = False
        self.nbws -= len(go)
        if self.race is not None:
            for k in np.unique(self.bws_mm[go]):
                q = go[self.bws_mm[go] == k]
                self.race.warp_sync(q, False)
        for pc in np.unique(self.bws_pc[go]):
            for d in np.unique(self.bws_depth[go]):
                self.enqueue(int(pc) + 1, int(d), go[(self.bws_pc[go] == pc) & (self.bws_depth[go] == d)])

    def bar_check(self, cta: int, bid: int) -> None:
        b = self.bars.get((cta, bid))
        if b is None or len(b.lanes) == 0:
            return
        ins0 = self.code[int(b.pcs[0])]
        live = np.flatnonzero(self.live[cta * self.T : (cta + 1) * self.T]) + cta * self.T
        if b.count is None:
            if len(b.lanes) < len(live):
                return
            nex = self.nt - len(live)
            if nex and self.opts.exited_barrier != "off":
                self.exited_at_barrier(ins0, cta, nex)
        else:
            wa = np.bincount(b.lanes >> 5, minlength=self.nw)
            wl = np.bincount(live >> 5, minlength=self.nw)
            # a warp counts (as 32 threads) once all its live lanes have arrived
            full = (wa > 0) & (wa >= wl)
            got = int(full.sum()) * 32
            if got < b.count:
                return
            if got > b.count:
                self.fail(
                    BarrierDivergenceError,
                    ins0,
                    int(b.lanes[0]),
                    f"barrier {bid}: {got} threads arrived but the barrier expects {b.count}",
                )
        # aligned barriers: one pc per warp
        al = np.array(
            [not self.code[int(p)].op.startswith("barrier") or "aligned" in self.code[int(p)].parts for p in b.pcs]
        )
        o = np.argsort(b.lanes, kind="stable")
        lw, pw = b.lanes[o] >> 5, b.pcs[o]
        diff = (lw[1:] == lw[:-1]) & (pw[1:] != pw[:-1])
        if diff.any() and al.any():
            i = int(np.argmax(diff))
            a, c = self.code[int(pw[i])], self.code[int(pw[i + 1])]
            self.fail(
                BarrierDivergenceError,
                a,
                int(b.lanes[o][i]),
                f"barrier {bid}: threads of warp {int(lw[i]) % (self.T // 32)} wait at different barrier "
                f"instructions (PTX line {a.line} and line {c.line})",
                other_line=c.line,
            )
        ups = np.unique(b.pcs)
        if len(ups) > 1 and self.opts.barrier_pc != "off" and b.count is None:
            msg = "warps of one CTA met different barrier instructions: PTX lines " + ", ".join(
                str(self.code[int(p)].line) for p in ups
            )
            if self.opts.barrier_pc == "error":
                self.fail(BarrierDivergenceError, ins0, int(b.lanes[0]), msg)
            self.warn(ins0, "barrier divergence between warps", msg)
        lanes, pcs, depth, kind, preds = b.lanes, b.pcs, b.depth, b.kind, b.preds
        del self.bars[(cta, bid)]
        sync = kind != 1
        self.nbar -= int(sync.sum())
        self.st.barriers += 1
        if self.race is not None:
            if b.count is None or len(lanes) == len(live):
                if sync.all():
                    self.race.cta_barrier(np.array([cta]))
                else:
                    self.race.part_barrier(cta, lanes, lanes[sync])
            else:
                self.race.part_barrier(cta, lanes, lanes[sync])
        if (kind == 2).any():
            for p in np.unique(pcs[kind == 2]):
                sel = lanes[(pcs == p) & (kind == 2)]
                self.prog.h_red[int(p)](self, sel, preds[kind == 2])
        for p in np.unique(pcs[sync]):
            for d in np.unique(depth[sync]):
                q = lanes[sync & (pcs == p) & (depth == d)]
                q = np.sort(q)
                self.enqueue(int(p) + 1, int(d), q)

    def exited_at_barrier(self, ins: Ins, cta: int, nex: int) -> None:
        msg = f"barrier completed although {nex} thread(s) of CTA {int(self.ctas[cta])} had already exited"
        if self.opts.exited_barrier == "error":
            self.fail(BarrierDivergenceError, ins, None, msg)
        self.warn(ins, "exited threads at barrier", msg)

    def deadlock(self) -> NoReturn:
        lines = []
        some = None
        for (cta, bid), b in sorted(self.bars.items(), key=lambda t: t[0]):
            if len(b.lanes) == 0:
                continue
            some = self.code[int(b.pcs[0])]
            live = np.flatnonzero(self.live & (self.cta_of == cta))
            miss = np.setdiff1d(live, b.lanes)
            for pc in np.unique(b.pcs):
                ls = b.lanes[b.pcs == pc]
                lines.append(
                    f"CTA {int(self.ctas[cta])} barrier {bid}: {len(ls)} threads {_ranges(ls % self.T)} wait at "
                    f"PTX line {self.code[int(pc)].line} [{self.code[int(pc)].text}]"
                    + (f", expecting {b.count} threads" if b.count else "")
                )
            if len(miss):
                lines.append(f"   missing live threads {_ranges(miss % self.T)}")
        for (_d, pc), ls in self.parked.items():
            some = some or self.code[pc]
            lines.append(
                f"threads {_ranges(ls % self.T)} wait for other lanes of their membermask at PTX line "
                f"{self.code[pc].line} [{self.code[pc].text}] ({self.tname(int(ls[0]))})"
            )
        if self.nbws:
            ls = np.flatnonzero(self.bws_wait)
            pc = int(self.bws_pc[ls[0]])
            some = some or self.code[pc]
            lines.append(f"threads {_ranges(ls % self.T)} wait in bar.warp.sync, PTX line {self.code[pc].line}")
        more = "" if len(lines) <= 12 else f"\n  ... {len(lines) - 12} more"
        raise DeadlockError(
            f"kernel {self.prog.kernel.demangled}: deadlock, no thread can proceed:\n  "
            + "\n  ".join(lines[:12])
            + more,
            kernel=self.prog.kernel.demangled,
            line=some.line if some else None,
            waiting=lines,
        )


def _ranges(t: Iterable[int]) -> str:
    t = sorted({int(x) for x in t})
    out, i = [], 0
    while i < len(t):
        j = i
        while j + 1 < len(t) and t[j + 1] == t[j] + 1:
            j += 1
        out.append(str(t[i]) if i == j else f"{t[i]}-{t[j]}")
        i = j + 1
        if len(out) > 8:
            out.append("...")
            break
    return "[" + ",".join(out) + "]"
