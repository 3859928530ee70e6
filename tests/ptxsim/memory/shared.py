"""Per-CTA shared memory with initialisation, race and asynchronous copy tracking."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array
from ..errors import AsyncHazardError, MisalignedError, OutOfBoundsError, SharedRaceError, UninitSharedError
from ..parse.syntax import Ins
from .addresses import SHARED_START, UDT
from .races import Race

if TYPE_CHECKING:
    from ..machine.options import Options
    from ..machine.state import State


class SharedMem:
    """Shared memory of all CTAs of a chunk, one window each."""

    def __init__(self, m: State, nbytes: int, layout: list[tuple[int, int, str]], opts: Options, granule: int) -> None:
        """layout: list of (off, size, name) valid ranges (offsets inside the CTA window)."""
        self.m = m
        self.S = S = max(128, (nbytes + 127) // 128 * 128)
        self.layout = layout
        self.n = m.ncta * S
        self.raw = np.full(self.n, 0xFF, np.uint8)
        self._views = {1: self.raw}
        self.ok = np.zeros(S, bool)
        for o, s, _ in layout:
            self.ok[o : o + s] = True
        self.all_ok = bool(self.ok[SHARED_START:nbytes].all()) if nbytes > SHARED_START else False
        self.nbytes = nbytes
        self.G = G = granule
        self.gs = G.bit_length() - 1
        self.uninit = opts.uninit_shared != "off"
        self.uninit_mode = opts.uninit_shared
        self.init = np.zeros(self.n >> self.gs, bool) if self.uninit else None
        self.race = Race(self.n >> self.gs, m.L, m.T, m.nw) if opts.race_shared != "off" else None
        self.race_mode = opts.race_shared
        self.pend: Array | None = None  # lane+1 of in flight cp.async
        self.base_of_lane = (np.arange(m.L) // m.T * S).astype(np.int64)

    def view(self, es: int) -> Array:
        v = self._views.get(es)
        if v is None:
            v = self._views[es] = self.raw.view(UDT[es])
        return v

    def name_of(self, off: int) -> str:
        for o, s, n in self.layout:
            if o <= off < o + s:
                return f"{n}+{off - o}"
        return f"shared+{off}"

    def units(self, flat: Array, size: int) -> Array:
        k = size >> self.gs
        u = flat >> self.gs
        if k <= 1:
            return u
        return (u[:, None] + np.arange(k)).ravel()

    def check(
        self, ins: Ins, lanes: Array, off: Array, size: int, kind: str, atomic: bool = False, stat: bool = True
    ) -> Array:
        """kind: 'r' 'w' 'rw' 'cp'(async write issue). Returns flat byte offsets."""
        m = self.m
        bad = (off & (size - 1)) != 0
        if bad.any():
            i = int(np.argmax(bad))
            m.fail(
                MisalignedError,
                ins,
                int(lanes[i]),
                f"misaligned {size}-byte shared access at offset {int(off[i])} ({self.name_of(int(off[i]))})",
                address=int(off[i]),
            )
        oob = (off < SHARED_START) | (off + size > self.nbytes)
        if not self.all_ok and not oob.any():
            oob = ~(self.ok[off] & self.ok[off + size - 1])
        if oob.any():
            i = int(np.argmax(oob))
            o = int(off[i])
            lay = ", ".join(f"{n}=[{a},{a + s})" for a, s, n in self.layout) or "none declared"
            m.fail(
                OutOfBoundsError,
                ins,
                int(lanes[i]),
                f"shared memory access of {size} bytes at offset {o} outside every shared object (objects: {lay})",
                address=o,
            )
        flat = off + self.base_of_lane[lanes]
        if stat and m.stats_on:
            m.st.bank(ins.pc, lanes, off, size, kind)
        if self.pend is None and self.init is None and self.race is None:
            return flat
        u = self.units(flat, size)
        if self.pend is not None:
            p = self.pend[u]
            if p.any():
                k = len(u) // len(lanes)
                j = int(np.argmax(p != 0))
                i = j // k
                m.fail(
                    AsyncHazardError,
                    ins,
                    int(lanes[i]),
                    f"access ({'read' if kind == 'r' else 'write'}) to {self.name_of(int(off[i]))} while a cp.async "
                    f"issued by {m.tname(int(p[j]) - 1)} is still in flight (missing cp.async.wait_group/wait_all?)",
                    address=int(off[i]),
                )
        if self.init is not None:
            if kind in ("r", "rw"):
                q = self.init[u]
                if not q.all():
                    k = len(u) // len(lanes)
                    j = int(np.argmin(q))
                    i = j // k
                    msg = (
                        f"read of uninitialised shared memory at {self.name_of(int(off[i]))} "
                        f"(byte offset {int(off[i]) + (j % k) * self.G})"
                    )
                    if self.uninit_mode == "error":
                        m.fail(UninitSharedError, ins, int(lanes[i]), msg, address=int(off[i]))
                    m.warn(ins, "uninitialised shared read", msg)
            if kind in ("w", "rw", "cp"):
                self.init[u] = True
        if self.race is not None:
            self.race_check(ins, lanes, off, u, "w" if kind != "r" else "r", atomic)
        return flat

    def race_check(self, ins: Ins, lanes: Array, off: Array, u: Array, kind: str, atomic: bool) -> None:
        R = self.race
        assert R is not None
        m = self.m
        k = len(u) // len(lanes)
        ln = (np.repeat(lanes, k) if k > 1 else lanes).astype(np.int32)
        cur = R.interval[ln // m.T]
        # previous writer
        c = R.w_int[u] == cur
        if c.any():
            wl = R.w_lane[u]
            c &= wl != ln
            if atomic:
                c &= ~R.w_at[u]
            if c.any():
                c &= ~R.ordered(wl, R.w_ep[u], ln)
                if c.any():
                    self._report(ins, ln, off, u, k, c, wl, "wrote", kind, R.w_pc)
        r1 = R.r1_int[u] == cur
        r2 = R.r2_int[u] == cur
        if kind == "w":
            for c, lane, ep, at, pcs in (
                (r1, R.r1_lane, R.r1_ep, R.r1_at, R.r1_pc),
                (r2, R.r2_lane, R.r2_ep, R.r2_at, R.r2_pc),
            ):
                if c.any():
                    rl = lane[u]
                    c = c & (rl != ln)
                    if atomic:
                        c &= ~at[u]
                    if c.any():
                        c &= ~R.ordered(rl, ep[u], ln)
                        if c.any():
                            self._report(ins, ln, off, u, k, c, rl, "read", kind, pcs)
            R.w_int[u] = cur
            R.w_lane[u] = ln
            R.w_ep[u] = R.E[ln]
            R.w_at[u] = atomic
            R.w_pc[u] = ins.pc
            ov = R.w_lane[u]
            d = ov != ln
            if d.any() and not atomic:
                d &= (ov >> 5) != (ln >> 5)
                if d.any():
                    self._report(ins, ln, off, u, k, d, ov, "wrote", kind, R.w_pc)
        else:
            l1 = R.r1_lane[u]
            rep1 = ~r1 | (l1 == ln)
            if not rep1.all():
                rep1 |= R.ordered(l1, R.r1_ep[u], ln)
            if rep1.all():
                a = u
                al = ln
                rest = None
            else:
                a, al = u[rep1], ln[rep1]
                rest = ~rep1
            R.r1_int[a] = R.interval[al // m.T]
            R.r1_lane[a] = al
            R.r1_ep[a] = R.E[al]
            R.r1_at[a] = atomic
            R.r1_pc[a] = ins.pc
            lost = R.r1_lane[u] != ln
            if rest is not None:
                lost |= rest
            if lost.any():
                b, bl = u[lost][::-1], ln[lost][::-1]
                R.r2_int[b] = R.interval[bl // m.T]
                R.r2_lane[b] = bl
                R.r2_ep[b] = R.E[bl]
                R.r2_at[b] = atomic
                R.r2_pc[b] = ins.pc

    def stamp_write(self, ins: Ins, lanes: Array, u: Array) -> None:
        """an asynchronous write lands now (conflicts were checked when it was issued, accesses in between raised)."""
        R = self.race
        assert R is not None
        ln = np.repeat(lanes, len(u) // len(lanes)).astype(np.int32)
        R.w_int[u] = R.interval[ln // self.m.T]
        R.w_lane[u] = ln
        R.w_ep[u] = R.E[ln]
        R.w_at[u] = False
        R.w_pc[u] = ins.pc

    def _report(
        self, ins: Ins, ln: Array, off: Array, u: Array, k: int, c: Array, prev: Array, what: str, kind: str, pcs: Array
    ) -> None:
        m = self.m
        j = int(np.argmax(c))
        i = j // k
        o = int(off[i]) + (j % k) * self.G
        pi = m.code[int(pcs[u[j]])]
        msg = (
            f"shared memory race at {self.name_of(o)} (offset {o}): {m.tname(int(ln[j]))} "
            f"{'reads' if kind == 'r' else 'writes'} here, {m.tname(int(prev[j]))} {what} it at line {pi.line} "
            f"[{pi.text}] with no barrier / warp sync in between"
        )
        if self.race_mode == "warn":
            m.warn(ins, "shared race", msg)
            return
        m.fail(SharedRaceError, ins, int(ln[j]), msg, address=o, other_line=pi.line)
