"""Device memory: the registered host buffers and their virtual device addresses."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np

from ..aliases import Array
from ..errors import LaunchError
from .addresses import GLOBAL_BASE, GUARD, UDT

# first address, end, region, address - host offset of the region
Entry: TypeAlias = "tuple[int, int, Region, int]"


def is_torch(x: object) -> bool:
    return type(x).__module__.split(".")[0] == "torch" and hasattr(x, "data_ptr")


def buffer_span(x: Any) -> tuple[int, int, int, int]:
    """(storage_ptr, storage_bytes, first_byte_ptr, span_bytes) of a numpy array or a torch CPU tensor."""
    if is_torch(x):
        if x.device.type != "cpu":
            raise LaunchError(f"only CPU tensors can be registered, got {x.device}")
        st = x.untyped_storage()
        n = 0
        if x.numel():
            n = 1 + sum((s - 1) * abs(d) for s, d in zip(x.shape, x.stride(), strict=True))
        return st.data_ptr(), st.nbytes(), x.data_ptr(), n * x.element_size()
    if isinstance(x, np.ndarray):
        root = x
        while isinstance(root.base, np.ndarray):
            root = root.base
        if x.size == 0:
            p = x.__array_interface__["data"][0]
            return p, 0, p, 0
        lo, hi = np.lib.array_utils.byte_bounds(x)
        rlo, rhi = np.lib.array_utils.byte_bounds(root)
        if not (rlo <= lo and hi <= rhi):
            rlo, rhi = lo, hi
        return rlo, rhi - rlo, lo, hi - lo
    raise LaunchError(f"cannot register object of type {type(x)}")


class Region:
    """One registered host allocation."""

    def __init__(self, name: str, base: int, host_ptr: int, size: int, owner: object, readonly: bool = False) -> None:
        self.name, self.base, self.size, self.owner = name, base, size, owner
        self.host_ptr = host_ptr
        self.auto = False
        self.end = base + size
        self.readonly = readonly
        self.u8: Array = (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(host_ptr)) if size else np.zeros(0, np.uint8)
        )
        self._views: dict[int, Array] = {1: self.u8}
        # byte ranges a kernel may touch: registered by the user, and by the arguments of the launch `aepoch`
        self.spans: list[tuple[int, int]] = []
        self.espans: list[tuple[int, int]] = []
        self.aspans: list[tuple[int, int]] = []
        self.aepoch = -1
        self.lo = self.hi = 0
        self.valid: Array | None = None  # where the spans leave holes
        self.init: Array | None = None  # bytes written so far, of buffers registered with init=False
        self.reset_stats()

    def add_span(self, lo: int, hi: int, auto: bool = False, epoch: int = 0) -> None:
        if auto:
            if self.aepoch != epoch:  # spans of an earlier launch's arguments no longer count
                self.aspans, self.aepoch = [], epoch
            if (lo, hi) not in self.aspans:
                self.aspans.append((lo, hi))
        elif (lo, hi) not in self.espans:
            self.espans.append((lo, hi))
        self.spans = self.espans + self.aspans
        self.lo = min(s[0] for s in self.spans)
        self.hi = max(s[1] for s in self.spans)
        self.valid = None
        if len(self.spans) > 1:
            v = np.zeros(self.size, bool)
            for a, b in self.spans:
                v[a:b] = True
            if not v[self.lo : self.hi].all():
                self.valid = v

    def view(self, es: int) -> Array:
        v = self._views.get(es)
        if v is None:
            v = self.u8[: self.size // es * es].view(UDT[es])
            self._views[es] = v
        return v

    def reset_stats(self) -> None:
        self.rd: Array | None = None
        self.wr: Array | None = None
        self.gw: Array | None = None

    def sect(self, write: bool) -> Array:
        n = (self.size >> 5) + 2
        if write:
            if self.wr is None:
                self.wr = np.zeros(n, bool)
            return self.wr
        if self.rd is None:
            self.rd = np.zeros(n, bool)
        return self.rd

    def race_arrays(self) -> tuple[Array, Array, Array, Array]:
        if self.gw is None:
            self.gw = np.full(self.size, -1, np.int32)
            self.gwa = np.zeros(self.size, bool)
            self.gr1 = np.full(self.size, -1, np.int32)
            self.gr2 = np.full(self.size, -1, np.int32)
        return self.gw, self.gwa, self.gr1, self.gr2


class Memory:
    """The set of device buffers a kernel may touch.

    Every distinct host allocation gets a 256-byte aligned *virtual* device base with a 16 MiB guard gap, so
    out-of-range accesses cannot land in a neighbour by accident.  The host address of a registered buffer is
    accepted as an alias (needed for pointers packed inside structs via data_ptr()).
    """

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.next = GLOBAL_BASE
        self._by_host: dict[tuple[int, int], Region] = {}
        self._tab: tuple[list[int], list[Entry], Array, Array] | None = None
        self.epoch = 0

    def register(
        self, x: Any, name: str | None = None, readonly: bool = False, init: bool = True, auto: bool = False
    ) -> int:
        """Register a buffer; returns its device address."""
        sp, sn, dp, dn = buffer_span(x)
        key = (sp, sn)
        r = self._by_host.get(key)
        if r is None:
            base = (self.next + 255) // 256 * 256
            r = Region(name or f"buf{len(self.regions)}", base, sp, sn, x, readonly)
            self.next = base + sn + GUARD
            self._by_host[key] = r
            self.regions.append(r)
            self._tab = None
            r.auto = auto
        elif not auto:
            r.auto = False
        if name:
            r.name = name
        r.readonly = readonly if readonly else r.readonly
        r.owner = r.owner if r.owner is x else (r.owner, x)
        r.add_span(dp - sp, dp - sp + dn, auto, self.epoch)
        if not init:
            if r.init is None:
                r.init = np.ones(sn, bool)
            r.init[dp - sp : dp - sp + dn] = False
        return r.base + (dp - sp)

    addr = register

    def release(self, keep: Iterable[Region] = ()) -> None:
        """Forget every buffer that launch() registered on its own; explicitly registered ones stay."""
        for k, r in list(self._by_host.items()):
            if r.auto and r not in keep:
                del self._by_host[k]
                self.regions.remove(r)
        self._tab = None

    def unregister(self, x: Any) -> None:
        sp, sn, _dp, _dn = buffer_span(x)
        r = self._by_host.pop((sp, sn), None)
        if r is not None:
            self.regions.remove(r)
            self._tab = None

    def unwritten(self, x: Any) -> int:
        """Bytes of the elements of `x`, a buffer registered with init=False, that no store has reached."""
        sp, sn, _, _ = buffer_span(x)
        r = self._by_host.get((sp, sn))
        if r is None:
            raise LaunchError("unwritten: the buffer is not registered")
        if r.init is None or sn == 0:
            return 0
        if is_torch(x):
            first, es = x.data_ptr(), x.element_size()
            steps = [s * es for s in x.stride()]
        else:
            first, es, steps = x.__array_interface__["data"][0], x.itemsize, list(x.strides)
        # the bytes of the elements only: a strided view may have gaps
        seen = np.lib.stride_tricks.as_strided(r.init[first - sp :], (*x.shape, es), (*steps, 1), writeable=False)
        return int(seen.size - np.count_nonzero(seen))

    def alloc(
        self,
        shape: int | tuple[int, ...],
        dtype: Any = np.uint8,
        align: int = 256,
        name: str | None = None,
        init: bool = True,
    ) -> Array:
        """Zero filled numpy array whose host address is aligned; registered."""
        dt = np.dtype(dtype)
        n = int(np.prod(shape)) * dt.itemsize
        raw = np.zeros(n + align, np.uint8)
        o = -raw.ctypes.data % align
        a = np.frombuffer(raw[o : o + n].data, dt).reshape(shape)
        self.register(a, name, init=init)
        return a

    def table(self) -> tuple[list[int], list[Entry], Array, Array]:
        if self._tab is None:
            ent: list[Entry] = []
            for r in self.regions:
                if r.size == 0:
                    continue
                ent.append((r.base, r.end, r, 0))
                ent.append((r.host_ptr, r.host_ptr + r.size, r, r.base - r.host_ptr))
            ent.sort(key=lambda e: e[0])
            # host ranges of different views of one allocation may nest: keep as is, lookups take the last start
            self._tab = (
                [e[0] for e in ent],
                ent,
                np.array([e[0] for e in ent], np.uint64),
                np.array([e[1] for e in ent], np.uint64),
            )
        return self._tab

    def lookup(self, a: int) -> Entry | None:
        starts, ent, _, _ = self.table()
        i = bisect.bisect_right(starts, a) - 1
        for j in range(i, max(-1, i - 6), -1):  # host alias ranges may nest
            e = ent[j]
            if e[0] <= a < e[1]:
                return e
        return None

    def describe(self, a: int) -> str:
        best: tuple[int, Region, int, int] | None = None
        for r in self.regions:
            for b0, lo, hi in ((r.base, r.lo, r.hi), (r.host_ptr, r.lo, r.hi)):
                d = 0 if b0 + lo <= a < b0 + hi else min(abs(a - (b0 + lo)), abs(a - (b0 + hi - 1)))
                if best is None or d < best[0]:
                    best = (d, r, a - b0 - lo, hi - lo)
        if best is None:
            return "no buffers are registered"
        d, r, off, n = best
        if d > GUARD:
            return "far away from every registered buffer (bad pointer?)"
        return f"nearest buffer '{r.name}' ({n} bytes), offset {off}" + (
            f" ({off - n + 1} past the last byte)" if off >= n else ""
        )
