"""Launch options and the small records of the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..aliases import Array, Sel

if TYPE_CHECKING:
    from ..parse.syntax import Ins

ALLSEL = slice(None)
Dims: TypeAlias = tuple[int, int, int]


@dataclass
class Options:
    """Keywords of `Module.launch`."""

    uninit_shared: str = "error"  # error | warn | off
    race_shared: str = "error"  # error | warn | off
    race_global: bool = False  # cross-CTA global race detection
    exited_barrier: str = "warn"  # warn | error | off: barrier completes although threads already exited
    barrier_pc: str = "warn"  # warn | error | off: warps meet different bar instructions
    shfl_orders_memory: bool = True  # treat shfl.sync like __syncwarp for the race detector
    shared_redzone: bool = True
    stats: bool = True
    max_steps: int = 200_000_000  # emulator steps per chunk
    quantum: int = 4000  # steps before a spinning group yields to another
    lanes_per_chunk: int = 4096
    max_chunk_shared: int = 64 << 20
    max_chunk_registers: int = 512 << 20  # bytes: a kernel may have tens of thousands of virtual registers
    ctas_per_chunk: int = 0  # 0: automatic
    cooperative: bool = False  # all CTAs in one chunk (grid-wide spinning works)
    only_ctas: Iterable[int] | None = None  # linear CTA ids to simulate, of those in the grid
    trace: Callable[[Ins, Array], None] | None = None  # callable(ins, lanes) per executed step
    max_warnings: int = 200
    seed_registers: bool = True  # fill registers with a poison pattern


class Group:
    """Lanes at one pc and call depth, run together."""

    __slots__ = ("depth", "full", "lanes", "lsel", "mm", "nw", "pc", "sel")

    def __init__(self, pc: int, depth: int, lanes: Array) -> None:
        self.pc, self.depth, self.lanes = pc, depth, lanes
        self.sel: Sel = lanes
        self.lsel: Sel = lanes
        self.full = False
        self.mm: Array | None = None
        self.nw = 0

    def sub(self, p: Array) -> Group:
        g = Group(self.pc, self.depth, self.lanes[p])
        return g


class Bar:
    """Arrivals at one CTA barrier."""

    __slots__ = ("count", "depth", "kind", "lanes", "pcs", "preds")

    def __init__(self) -> None:
        self.lanes: Array = np.zeros(0, np.int64)
        self.pcs: Array = np.zeros(0, np.int64)
        self.depth: Array = np.zeros(0, np.int64)
        self.kind: Array = np.zeros(0, np.int64)  # 0 sync 1 arrive 2 red
        self.preds: Array = np.zeros(0, bool)
        self.count: int | None = None


class MBar:
    """State of one mbarrier object."""

    __slots__ = ("acc", "acc_done", "count", "pending", "phase", "tx")

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.tx = 0
        self.phase = 0
        self.acc: Array | None = None
        self.acc_done: Array | None = None


def dims3(x: int | np.integer | Iterable[int]) -> Dims:
    """A grid or block given as an int or up to three ints."""
    if isinstance(x, (int, np.integer)):
        return (int(x), 1, 1)
    a, b, c = ([int(v) for v in x] + [1, 1, 1])[:3]
    return a, b, c
