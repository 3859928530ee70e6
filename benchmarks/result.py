"""What a run found of a case and of each of its baselines, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from benchmarks.costs import Costs
from benchmarks.timing import Stats

__all__ = ["BaselineResult", "Result"]


@dataclass(frozen=True)
class BaselineResult:
    """One baseline: its time and time(baseline) / time(ours), both over the rounds. `stats` None: not available."""

    name: str
    stats: Stats | None
    ratio: Stats | None
    target: float | None
    note: str = ""
    ratio_of_minima: float | None = None
    """Fastest time of the baseline over ours: what a quiet machine would show, where the median was disturbed."""
    faults: float | None = None
    """Page faults of a call."""

    @property
    def met(self) -> bool | None:
        """Whether the median ratio reaches the target; None without a target or a measurement."""
        return None if self.target is None or self.ratio is None else self.ratio.median >= self.target


@dataclass(frozen=True)
class Result:
    """One case. Times are seconds of one update (a loop's time is divided by its steps)."""

    name: str
    title: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    goal_us: float | None
    checks: tuple[dict[str, Any], ...]
    passed: bool
    ours: Stats | None = None
    copy: Stats | None = None
    others: float | None = None
    """Share of the cores that other processes used while this was timed."""
    baselines: tuple[BaselineResult, ...] = field(default_factory=tuple)
    faults: float | None = None
    """Page faults of a call of ours."""
    flops: int = 0
    """Operations of its matrix products."""
    gemm: float | None = None
    """Operations a second that the matrix products reach without anything around them, measured in the same process."""
    costs: dict[str, Costs] = field(default_factory=dict)
    """Dispatched ops and peak memory of ours ("diffkern") and of the baselines, where they were counted."""
    error: str = ""
    """Why there is nothing else: the case raised, or crashed."""

    @property
    def size(self) -> str:
        """The shape in words: 1x4x64x64."""
        return "x".join(map(str, self.shape))

    @property
    def rate(self) -> float:
        """Bytes a second that ours moves, counting each input and output once."""
        return self.bytes / self.ours.median if self.ours else math.nan

    @property
    def floor(self) -> float:
        """Time of a copy that moves as many bytes, over ours: 1 is the floor."""
        return self.copy.median / self.ours.median if self.copy and self.ours else math.nan

    @property
    def flop_rate(self) -> float:
        """Operations of matrix products a second."""
        return self.flops / self.ours.median if self.ours else math.nan

    @property
    def share(self) -> str:
        """How near the limit of the hardware: of the floor of memory, or of the rate of bare matrix products."""
        if self.flops and self.gemm:
            return f"{self.flop_rate / self.gemm:.2f} of the products"
        return f"{self.flop_rate / 1e9:.0f} GFLOP/s" if self.flops else f"{self.floor:.2f}"

    @property
    def goal_met(self) -> bool | None:
        return None if self.goal_us is None or self.ours is None else self.ours.median * 1e6 <= self.goal_us

    @property
    def missed(self) -> list[str]:
        """The targets of this case that were not reached, in words."""
        found = []
        for b in self.baselines:
            if b.met is False and b.ratio is not None:
                found.append(f"{self.name}: {b.ratio.median:.2f}x of {b.name}, target {b.target:.3g}x")
        if self.goal_met is False and self.ours is not None:
            found.append(f"{self.name}: {self.ours.median * 1e6:.1f} us, goal {self.goal_us:g} us")
        return found
