"""Happens-before shadow state of shared memory."""

from __future__ import annotations

import numpy as np

from ..aliases import Array


class Race:
    """Happens-before shadow state of shared memory for one chunk of CTAs."""

    def __init__(self, n: int, L: int, T: int, nw: int) -> None:

        def z() -> Array:
            return np.zeros(n, np.int32)

        self.w_int, self.w_lane, self.w_ep, self.w_at = z(), z(), z(), np.zeros(n, bool)
        self.r1_int, self.r1_lane, self.r1_ep, self.r1_at = z(), z(), z(), np.zeros(n, bool)
        self.r2_int, self.r2_lane, self.r2_ep, self.r2_at = z(), z(), z(), np.zeros(n, bool)
        self.w_pc, self.r1_pc, self.r2_pc = z(), z(), z()
        self.E = np.ones(L, np.int32)
        self.LF = np.zeros(L, np.int32)
        self.LK: Array | None = None  # per lane: epochs of the lanes of its own warp it knows of
        self.CK: Array | None = None  # per warp: epochs of all threads of the CTA it knows of
        self.L, self.T, self.nw = L, T, nw
        self.interval = np.ones(L // T, np.int32)

    def ordered(self, pl: Array, pe: Array, cl: Array) -> Array:
        same = (pl >> 5) == (cl >> 5)
        o = same & (self.LF[pl] >= pe)
        if self.LK is not None:
            o |= same & (self.LK[cl, pl & 31] >= pe)
        if self.CK is not None:
            o |= ~same & (self.CK[cl >> 5, pl % self.T] >= pe)
        return o

    def lane_knowledge(self) -> Array:
        if self.LK is None:
            self.LK = np.zeros((self.L, 32), np.int32)
        return self.LK

    def warp_knowledge(self) -> Array:
        if self.CK is None:
            self.CK = np.zeros((self.nw, self.T), np.int32)
        return self.CK

    def warp_sync(self, lanes: Array, full: bool) -> None:
        """lanes all synchronised per warp (full: every live lane of each warp takes part)."""
        if full:
            self.LF[lanes] = self.E[lanes]
        else:
            LK = self.lane_knowledge()
            for w in np.unique(lanes >> 5):
                ls = lanes[(lanes >> 5) == w]
                k = LK[ls].max(axis=0)
                k[ls & 31] = np.maximum(k[ls & 31], self.E[ls])
                LK[ls] = k
        self.E[lanes] += 1

    def cta_barrier(self, ctas: Array) -> None:
        self.interval[ctas] += 1

    def part_barrier(self, cta: int, arrive: Array, sync: Array) -> Array:
        """named barrier: lanes in arrive (incl. sync) release, lanes in sync acquire."""
        CK = self.warp_knowledge()
        ws = np.unique(arrive >> 5)
        acc = CK[ws].max(axis=0)
        t = arrive % self.T
        acc[t] = np.maximum(acc[t], self.E[arrive])
        if len(sync):
            sw = np.unique(sync >> 5)
            CK[sw] = np.maximum(CK[sw], acc)
            self.LF[sync] = self.E[sync]
        self.E[arrive] += 1
        return acc

    def release(self, lanes: Array) -> Array:
        """mbarrier style: returns accumulated knowledge of these lanes (one CTA)."""
        CK = self.warp_knowledge()
        acc = CK[np.unique(lanes >> 5)].max(axis=0)
        t = lanes % self.T
        acc[t] = np.maximum(acc[t], self.E[lanes])
        # in-warp knowledge flows as well: a warp that synchronised before releases everything it saw
        wl = (np.unique(lanes >> 5)[:, None] * 32 + np.arange(32)).ravel()
        acc[wl % self.T] = np.maximum(acc[wl % self.T], self.LF[wl])
        self.E[lanes] += 1
        return acc

    def acquire(self, lanes: Array, acc: Array) -> None:
        CK = self.warp_knowledge()
        sw = np.unique(lanes >> 5)
        CK[sw] = np.maximum(CK[sw], acc)
        # knowledge about lanes of the own warp
        LK = self.lane_knowledge()
        for w in sw:
            ls = lanes[(lanes >> 5) == w]
            base = (w * 32) % self.T
            LK[ls] = np.maximum(LK[ls], acc[base : base + 32])
