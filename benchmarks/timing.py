"""Paired timing: what is compared runs in turns, so that a slow moment of the machine falls on all of it.

A round runs each contestant once (its `calls` calls, enough to be measurable); ratios are taken inside a round, and
the median over the rounds is what counts. The spread (20th to 80th percentile) is the alarm: on a quiet machine it is a
few percent. On Linux the share of the cores that other processes took meanwhile is measured as well.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # not on every platform
    resource = None  # type: ignore[assignment]

__all__ = ["Measured", "Stats", "Timer", "calibrate", "cuda_timer", "interleave", "ratio", "wall_timer"]

Fn = Callable[[], object]
Timer = Callable[[Fn, int], float]
"""Calls a function that many times and returns the seconds of one call."""


@dataclass(frozen=True)
class Stats:
    """Median, minimum and 20th and 80th percentile of samples."""

    median: float
    minimum: float
    p20: float
    p80: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        """Raises ValueError without samples."""
        if not samples:
            raise ValueError("samples must hold at least one value, got none")
        ordered = sorted(samples)
        return Stats(
            statistics.median(ordered), ordered[0], _quantile(ordered, 0.2), _quantile(ordered, 0.8), len(ordered)
        )

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return (self.p80 - self.p20) / self.median if self.median else 0.0


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile by linear interpolation between the two samples around it."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Measured:
    """Seconds of one call of each contestant, round by round, and the share of the cores that others used."""

    samples: dict[str, list[float]]
    calls: dict[str, int]
    others: float | None
    faults: dict[str, float] = field(default_factory=dict)
    """Page faults of a call, on average."""

    def stats(self, name: str) -> Stats:
        """Statistics over the rounds."""
        return Stats.of(self.samples[name])


def ratio(measured: Measured, over: str, under: str) -> Stats:
    """Statistics of time(over) / time(under), taken round by round."""
    return Stats.of([a / b for a, b in zip(measured.samples[over], measured.samples[under], strict=True)])


# ------------------------------------------------------------------------------------------------------ timers
def wall_timer(sync: Fn | None = None, clock: Callable[[], int] = time.perf_counter_ns) -> Timer:
    """Wall time, Python and call overhead included; `sync` (CUDA) is called before the clock starts and stops."""

    def timer(fn: Fn, calls: int) -> float:
        repeat = range(calls)
        if sync is not None:
            sync()
        start = clock()
        for _ in repeat:
            fn()
        if sync is not None:
            sync()
        return (clock() - start) * 1e-9 / calls

    return timer


def cuda_timer(flush: Fn, sync: Fn, event: Callable[[], Any]) -> Timer:
    """Device time of each call between two events, with a cold L2: `flush` overwrites it before each call.

    The flush also keeps the device busy while the host queues the call, so that launches are not what is measured.
    """

    def timer(fn: Fn, calls: int) -> float:
        marks = [(event(), event()) for _ in range(calls)]
        for start, end in marks:
            flush()
            start.record()
            fn()
            end.record()
        sync()
        return sum(start.elapsed_time(end) for start, end in marks) * 1e-3 / calls

    return timer


def device_timer() -> Timer:  # pragma: no cover (needs a GPU)
    """`cuda_timer` for the current CUDA device."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    buffer = torch.empty(4 * max(properties.L2_cache_size, 32 << 20), dtype=torch.uint8, device="cuda")
    return cuda_timer(buffer.zero_, torch.cuda.synchronize, lambda: torch.cuda.Event(enable_timing=True))


# --------------------------------------------------------------------------------------------------- interleave
def calibrate(fn: Fn, timer: Timer, seconds: float, most: int = 20_000) -> int:
    """Number of calls that take about `seconds`, at least 1."""
    fn()
    calls = 1
    while True:
        took = timer(fn, calls) * calls
        if took >= seconds / 4 or calls >= most:
            return max(1, min(most, round(calls * seconds / max(took, 1e-9))))
        calls = min(most, calls * 4)


def interleave(
    contestants: Mapping[str, Fn],
    timer: Timer,
    *,
    rounds: int = 50,
    sample_seconds: float = 0.002,
    budget_seconds: float = 5.0,
    least_rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time the contestants in turns, `rounds` times or until the budget is spent (but `least_rounds` at least).

    Every second round runs them in reverse, so that none always follows the same neighbour. Garbage collection waits.
    """
    if rounds < 1 or least_rounds < 1:
        raise ValueError(f"rounds and least_rounds must be at least 1, got {rounds} and {least_rounds}")
    calls = {name: calibrate(fn, timer, sample_seconds) for name, fn in contestants.items()}
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    faults = dict.fromkeys(contestants, 0)
    names = list(contestants)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    before, start = _cpu_seconds(), clock()
    try:
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                faulted = _page_faults()
                samples[name].append(timer(contestants[name], calls[name]))
                faults[name] += _page_faults() - faulted
            if i + 1 >= least_rounds and clock() - start > budget_seconds:
                break
    finally:
        if collecting:
            gc.enable()
    others = _others(before, _cpu_seconds())
    each = {name: faults[name] / (len(samples[name]) * calls[name]) for name in names}
    return Measured(samples, calls, others, each)


def _page_faults() -> int:
    """Page faults of this process by now, 0 where the system does not tell: freed memory given back costs some."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource is not None else 0


def _cpu_seconds(stat: Path = Path("/proc/stat")) -> tuple[float, float, float, float] | None:
    """(wall, cores, busy core-seconds of the machine, of this process) by now; None where there is no /proc/stat."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, lines[0].split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    cores = sum(line.startswith("cpu") for line in lines) - 1
    return time.perf_counter(), cores, busy, own.user + own.system


def _others(
    before: tuple[float, float, float, float] | None, after: tuple[float, float, float, float] | None
) -> float | None:
    """Share of the cores, 0 to 1, that other processes (and the host: steal) used between two `_cpu_seconds`."""
    if before is None or after is None or after[0] <= before[0]:
        return None
    used = (after[2] - before[2]) - (after[3] - before[3])
    return min(1.0, max(0.0, used / ((after[0] - before[0]) * after[1])))
