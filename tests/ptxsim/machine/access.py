"""Loads and stores of every state space, with the checks on global memory."""

from __future__ import annotations

from typing import NoReturn, TypeAlias

import numpy as np

from ..aliases import Array
from ..errors import GlobalRaceError, MisalignedError, OutOfBoundsError, ReadOnlyError, UninitGlobalError
from ..memory import Region
from ..memory.addresses import LO_HI, PA_HI, SH_HI, SPACE_OF, UDT
from ..ops.context import U64
from ..parse.syntax import Ins
from ..stats import nuniq
from .state import State

# region, positions among the lanes (None: all of them), byte offsets in the region
Hit: TypeAlias = tuple[Region, Array | None, Array]


class Access(State):
    """Memory instructions: address resolution, checks, statistics, data movement."""

    def resolve(self, ins: Ins, lanes: Array, addr: Array, size: int, write: bool) -> list[Hit]:
        """yields (region, position selector, byte offsets)."""
        a0, a1 = int(addr.min()), int(addr.max())
        e = self.mem.lookup(a0) if a0 >= 0 else None
        if e is not None and a1 + size <= e[1]:
            r, delta = e[2], e[3]
            off = addr + (delta - r.base)
            self._rcheck(ins, lanes, addr, r, off, size, write)
            return [(r, None, off)]
        _, ent, st, en = self.mem.table()
        if len(st) == 0:
            self.fail(
                OutOfBoundsError,
                ins,
                int(lanes[0]),
                f"access of {size} bytes at address {a0:#x}: no device buffer is registered",
                address=a0,
            )
        i = np.searchsorted(st, addr.view(U64), "right").astype(np.int64) - 1
        bad = i < 0
        ic = np.maximum(i, 0)
        bad |= (addr.view(U64) + U64(size)) > en[ic]
        if bad.any():
            # nested host ranges: fall back to the scalar lookup before giving up
            for j in np.flatnonzero(bad).tolist():
                e = self.mem.lookup(int(addr[j]))
                if e is None or int(addr[j]) + size > e[1]:
                    a = int(addr[j]) & (2**64 - 1)
                    self.fail(
                        OutOfBoundsError,
                        ins,
                        int(lanes[j]),
                        f"{'store' if write else 'load'} of {size} bytes at "
                        f"unregistered address {a:#x}; {self.mem.describe(a)}",
                        address=a,
                    )
                ic[j] = next(q for q in range(len(ent)) if ent[q] is e)
        out: list[Hit] = []
        for q in np.unique(ic):
            pos = np.flatnonzero(ic == q)
            e = ent[q]
            off = addr[pos] + (e[3] - e[2].base)
            self._rcheck(ins, lanes[pos], addr[pos], e[2], off, size, write)
            out.append((e[2], pos, off))
        return out

    def _rcheck(self, ins: Ins, lanes: Array, addr: Array, r: Region, off: Array, size: int, write: bool) -> None:
        mis = off & size - 1 if r.base & 15 == 0 else off + r.base & size - 1
        if mis.any():
            j = int(np.argmax(mis != 0))
            self.fail(
                MisalignedError,
                ins,
                int(lanes[j]),
                f"misaligned {size}-byte access at address "
                f"{int(addr[j]):#x} (buffer '{r.name}' offset {int(off[j]) - r.lo})",
                address=int(addr[j]),
            )
        bad = (off < r.lo) | (off + size > r.hi) if r.lo != 0 or r.hi != r.size else None
        if r.valid is not None:
            v = ~(r.valid[off] & r.valid[off + size - 1])
            bad = v if bad is None else bad | v
        if bad is not None and bad.any():
            j = int(np.argmax(bad))
            self.fail(
                OutOfBoundsError,
                ins,
                int(lanes[j]),
                f"{'store' if write else 'load'} of {size} bytes outside "
                f"buffer '{r.name}': offset {int(off[j]) - r.lo} of {r.hi - r.lo} bytes",
                address=int(addr[j]),
            )
        if write and r.readonly:
            self.fail(ReadOnlyError, ins, int(lanes[0]), f"store to read-only buffer '{r.name}'", address=int(addr[0]))

    def gaccess(self, ins: Ins, lanes: Array, addr: Array, size: int, kind: str, strong: bool = False) -> list[Hit]:
        """check + statistics; returns resolve() list. kind r w a c."""
        rs = self.resolve(ins, lanes, addr, size, kind in "wa")
        if self.stats_on:
            self.st.glob(ins.pc, lanes, addr, size, kind)
            for r, _, off in rs:
                s = (off + (r.base & 31)) >> 5
                if kind in "rc":
                    r.sect(False)[s] = True
                elif kind == "w":
                    r.sect(True)[s] = True
                else:
                    r.sect(False)[s] = True
                    r.sect(True)[s] = True
        for r, pos, off in rs:
            if r.init is not None:
                b = off[:, None] + np.arange(size)
                if kind in "rca":
                    q = r.init[b]
                    if not q.all():
                        j = int(np.argmin(q.all(axis=1)))
                        ln = lanes if pos is None else lanes[pos]
                        self.fail(
                            UninitGlobalError,
                            ins,
                            int(ln[j]),
                            f"read of never written bytes of buffer '{r.name}' at offset {int(off[j]) - r.lo}",
                            address=int(off[j]) + r.base,
                        )
                if kind in "wa":
                    r.init[b] = True
        if self.opts.race_global:
            for r, pos, off in rs:
                self.grace(ins, lanes if pos is None else lanes[pos], r, off, size, kind, strong or kind == "a")
        return rs

    def grace(self, ins: Ins, lanes: Array, r: Region, off: Array, size: int, kind: str, strong: bool) -> None:
        gw, gwa, g1, g2 = r.race_arrays()
        u = (off[:, None] + np.arange(size)).ravel()
        ln = np.repeat(lanes, size)
        c = self.ctas[self.cta_of[ln]].astype(np.int32)

        def rep(bad: Array, arr: Array, what: str) -> NoReturn:
            j = int(np.argmax(bad))
            self.fail(
                GlobalRaceError,
                ins,
                int(ln[j]),
                f"global race on buffer '{r.name}' offset {int(u[j]) - r.lo}: "
                f"CTA {int(c[j])} {'reads' if kind in 'rc' else 'writes'} here, CTA {int(arr[u[j]])} {what} it "
                "in the same launch",
                address=int(u[j]) + r.base,
            )

        p = gw[u]
        bad = (p >= 0) & (p != c)
        if strong:
            bad &= ~gwa[u]
        if bad.any():
            rep(bad, gw, "wrote")
        if kind in "wa":
            if not strong:
                for a in (g1, g2):
                    q = a[u]
                    bad = (q >= 0) & (q != c)
                    if bad.any():
                        rep(bad, a, "read")
            gw[u] = c
            gwa[u] = strong
            if not strong:
                bad = gw[u] != c
                if bad.any():
                    rep(bad, gw, "wrote")
        elif not strong:
            f = g1[u] < 0
            g1[u[f]] = c[f]
            d = g1[u] != c
            if d.any():
                g2[u[d]] = c[d]

    def gload(
        self, ins: Ins, lanes: Array, addr: Array, es: int, nv: int, kind: str = "r", strong: bool = False
    ) -> Array:
        size = es * nv
        rs = self.gaccess(ins, lanes, addr, size, kind, strong)
        if len(rs) == 1:
            r, _, off = rs[0]
            return _gather(r.u8 if r.base % es else r.view(es), off, es, nv, r.base % es != 0)
        out = np.empty((len(lanes), nv), UDT[es])
        for r, pos, off in rs:
            out[pos] = _gather(r.u8 if r.base % es else r.view(es), off, es, nv, r.base % es != 0)
        return out

    def gstore(self, ins: Ins, lanes: Array, addr: Array, es: int, vals: Array, strong: bool = False) -> None:
        nv = vals.shape[1]
        for r, pos, off in self.gaccess(ins, lanes, addr, es * nv, "w", strong):
            v = vals if pos is None else vals[pos]
            if r.base % es or (r.size % es and (off + es * nv > r.size // es * es).any()):
                b = np.ascontiguousarray(v).view(np.uint8).reshape(len(off), -1)
                r.u8[off[:, None] + np.arange(es * nv)] = b
            elif nv == 1:
                r.view(es)[off // es] = v[:, 0]
            else:
                r.view(es)[(off // es)[:, None] + np.arange(nv)] = v

    def lflat(self, ins: Ins, lanes: Array, off: Array, size: int) -> Array:
        fi = self.prog.finfo[ins.func.name]
        bad = (off < 0) | (off + size > self.lbase[lanes] + fi.frame)
        if bad.any():
            j = int(np.argmax(bad))
            self.fail(
                OutOfBoundsError,
                ins,
                int(lanes[j]),
                f"local memory access of {size} bytes at offset {int(off[j])} "
                f"outside the {int(self.lbase[lanes[j]]) + fi.frame} byte stack",
                address=int(off[j]),
            )
        mis = off & (size - 1)
        if mis.any():
            j = int(np.argmax(mis != 0))
            self.fail(
                MisalignedError,
                ins,
                int(lanes[j]),
                f"misaligned {size}-byte local access at {int(off[j])}",
                address=int(off[j]),
            )
        if self.stats_on:
            self.st.l_req[ins.pc] += nuniq(lanes >> 5)
            self.st.l_bytes[ins.pc] += size * len(lanes)
        return lanes * self.lcap + off

    def load(self, space: str, ins: Ins, lanes: Array, addr: Array, es: int, nv: int, strong: bool = False) -> Array:
        size = es * nv
        if space == "global":
            return self.gload(ins, lanes, addr, es, nv, strong=strong)
        if space == "shared":
            flat = self.sh.check(ins, lanes, addr, size, "r", strong)
            return _gather(self.sh.view(es), flat, es, nv, False)
        if space == "local":
            flat = self.lflat(ins, lanes, addr, size)
            return _gather(self.local.view(UDT[es]), flat, es, nv, False)
        if space == "kparam":
            bad = (addr < 0) | (addr + size > len(self.kparam))
            if bad.any():
                j = int(np.argmax(bad))
                self.fail(
                    OutOfBoundsError,
                    ins,
                    int(lanes[j]),
                    f"kernel parameter access at offset {int(addr[j])} of {len(self.kparam)}",
                    address=int(addr[j]),
                )
            b = self.kparam[(addr[:, None] + np.arange(size))]
            return np.ascontiguousarray(b).view(UDT[es])
        # generic
        h = addr >> 32
        h0 = int(h[0])
        if (h == h0).all() or not np.isin(h, (SH_HI, LO_HI, PA_HI)).any():
            sp, base = SPACE_OF.get(h0, ("global", 0))
            return self.load(sp, ins, lanes, addr - base, es, nv, strong)
        out = np.empty((len(lanes), nv), UDT[es])
        key = np.where(np.isin(h, (SH_HI, LO_HI, PA_HI)), h, 0)
        for k in np.unique(key):
            pos = np.flatnonzero(key == k)
            sp, base = SPACE_OF.get(int(k), ("global", 0))
            out[pos] = self.load(sp, ins, lanes[pos], addr[pos] - base, es, nv, strong)
        return out

    def store(
        self, space: str, ins: Ins, lanes: Array, addr: Array, es: int, vals: Array, strong: bool = False
    ) -> None:
        nv = vals.shape[1]
        size = es * nv
        if space == "global":
            self.gstore(ins, lanes, addr, es, vals, strong)
        elif space == "shared":
            flat = self.sh.check(ins, lanes, addr, size, "w", strong)
            v = self.sh.view(es)
            if nv == 1:
                v[flat // es] = vals[:, 0]
            else:
                v[(flat // es)[:, None] + np.arange(nv)] = vals
        elif space == "local":
            flat = self.lflat(ins, lanes, addr, size)
            self.local.view(UDT[es])[(flat // es)[:, None] + np.arange(nv)] = vals
        elif space == "generic":
            h = addr >> 32
            key = np.where(np.isin(h, (SH_HI, LO_HI, PA_HI)), h, 0)
            ks = np.unique(key)
            for k in ks:
                sp, base = SPACE_OF.get(int(k), ("global", 0))
                if len(ks) == 1:
                    self.store(sp, ins, lanes, addr - base, es, vals, strong)
                else:
                    pos = np.flatnonzero(key == k)
                    self.store(sp, ins, lanes[pos], addr[pos] - base, es, vals[pos], strong)
        else:
            self.fail(ReadOnlyError, ins, int(lanes[0]), f"store to {space} space")

    def gaccess_bytes(self, ins: Ins, lanes: Array, addr: Array, k: int) -> list[Hit]:
        if k & (k - 1) == 0:
            return self.gaccess(ins, lanes, addr, k, "c")
        # non power of two source sizes: check first and last byte
        self.resolve(ins, lanes, addr + (k - 1), 1, False)
        rs = self.resolve(ins, lanes, addr, 1, False)
        if self.stats_on:
            self.st.glob(ins.pc, lanes, addr, k, "c")
            for r, _pos, off in rs:
                r.sect(False)[(off + (r.base & 31)) >> 5] = True
        return rs

    def read_bytes(self, ins: Ins, lane: int, addr: int, n: int) -> bytes:
        ls = np.full(n, lane, np.int64)
        a = np.arange(addr, addr + n, dtype=np.int64)
        st, self.stats_on = self.stats_on, False
        try:
            return self.load("generic", ins, ls, a, 1, 1)[:, 0].tobytes()
        finally:
            self.stats_on = st

    def cstring(self, ins: Ins, lane: int, addr: int) -> str:
        out = b""
        while len(out) < 65536:
            c = self.read_bytes(ins, lane, addr + len(out), 1)
            if c == b"\0":
                break
            out += c
        return out.decode("utf-8", "replace")


def _gather(view: Array, off: Array, es: int, nv: int, bytewise: bool) -> Array:
    if bytewise or (len(view) * view.itemsize < 1):
        b = view[off[:, None] + np.arange(es * nv)]
        return np.ascontiguousarray(b).view(UDT[es])
    i = off // es if es > 1 else off
    if nv == 1:
        return view[i][:, None]
    return view[i[:, None] + np.arange(nv)]
