"""Asynchronous copies (cp.async): issued, in flight, landed."""

from __future__ import annotations

import numpy as np

from ..aliases import Array
from ..errors import MisalignedError
from ..parse.syntax import Ins
from .access import Access


class Copies(Access):
    """cp.async copies land only when the issuing thread waits for their group."""

    def cp_issue(self, ins: Ins, lanes: Array, dst: Array, src: Array, size: int, nbytes: Array) -> None:
        """nbytes: valid source bytes per lane (rest zero filled)."""
        n = len(lanes)
        data = np.zeros((n, size), np.uint8)
        for k in np.unique(nbytes):
            k = int(k)
            if k == 0:
                continue
            pos = np.flatnonzero(nbytes == k)
            a = src[pos]
            if (a & (size - 1)).any():
                j = int(np.argmax((a & (size - 1)) != 0))
                self.fail(
                    MisalignedError,
                    ins,
                    int(lanes[pos[j]]),
                    f"cp.async source {int(a[j]):#x} is not {size}-byte aligned",
                    address=int(a[j]),
                )
            rs = self.gaccess_bytes(ins, lanes[pos], a, k)
            for r, q, off in rs:
                b = r.u8[off[:, None] + np.arange(k)]
                if q is None:
                    data[pos, :k] = b
                else:
                    data[pos[q], :k] = b
        flat = self.sh.check(ins, lanes, dst, size, "cp")
        if self.sh.pend is None:
            self.sh.pend = np.zeros(self.sh.n >> self.sh.gs, np.int32)
        u = self.sh.units(flat, size)
        self.sh.pend[u] = np.repeat(lanes + 1, size >> self.sh.gs)
        v = self.sh.view(1)
        v[flat[:, None] + np.arange(size)] = 0xFF  # in flight: old contents are gone
        self.cp_queue.append([lanes, dst, flat, data, self.cp_group[lanes].copy(), size, ins])

    def cp_wait(self, lanes: Array, keep: int) -> None:
        """make all but the newest `keep` committed groups of these lanes visible; keep<0: everything."""
        if not self.cp_queue:
            return
        act = np.zeros(self.L, bool)
        act[lanes] = True
        thr = self.cp_group - keep if keep >= 0 else np.full(self.L, 1 << 60)
        q2 = []
        for e in self.cp_queue:
            ln, dst, flat, data, grp, size, ins = e
            done = act[ln] & (grp < thr[ln])
            if not done.any():
                q2.append(e)
                continue
            if done.all():
                landed, f, b = ln, flat, data
            else:
                landed, f, b = ln[done], flat[done], data[done]
                k = ~done
                q2.append([ln[k], dst[k], flat[k], data[k], grp[k], size, ins])
            self.sh.raw[f[:, None] + np.arange(size)] = b
            u = self.sh.units(f, size)
            if self.sh.pend is not None:
                self.sh.pend[u] = 0
            if self.sh.init is not None:
                self.sh.init[u] = True
            if self.sh.race is not None:
                self.sh.stamp_write(ins, landed, u)
        self.cp_queue = q2
        if not q2:
            self.sh.pend = None

    def _cp_leftover(self) -> None:
        for ln, _dst, _flat, _data, _grp, _size, ins in self.cp_queue:
            self.warn(ins, "cp.async never waited for", f"{len(ln)} thread(s) exited with this copy outstanding")
