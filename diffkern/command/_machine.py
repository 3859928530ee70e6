"""Whether the processor is shared with so much else that torch's threads wait for each other, and what helps then."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

__all__ = ["crowded", "crowding"]

CGROUP, STAT = Path("/sys/fs/cgroup"), Path("/proc/stat")


def crowding(seconds: float = 0.1) -> str | None:
    """What crowds this process's threads now, and what helps, one sentence; None where nothing does.

    Looks at the cores it may use, the quota of its cgroup, and for `seconds` at what other processes do on these cores.
    """
    cores = cores_allowed()
    return crowded(torch.get_num_threads(), min(len(cores), quota(CGROUP)), busy_elsewhere(cores, seconds))


def crowded(threads: int, cores: float, busy: float | None) -> str | None:
    """The sentence for so many threads on so many cores, of which other processes use `busy` (None: not known)."""
    if threads > cores:
        what = f"torch runs {threads} threads on {cores:g} cores"
    elif threads > 1 and busy is not None and threads + busy > cores + 0.3:
        what = f"torch runs {threads} threads on {cores:g} cores, of which other processes use {busy:.1f} now"
    else:
        return None
    return (
        f"{what}: threads wait for each other in every operation, and training may be ten times slower. What helps: "
        "OMP_WAIT_POLICY=passive in the environment, or one thread (--threads 1, OMP_NUM_THREADS=1)"
    )


def cores_allowed() -> set[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def quota(root: Path) -> float:
    """The cores' worth of time that the cgroup at this folder grants; infinity without a limit."""
    try:
        if (root / "cpu.max").exists():
            words = (root / "cpu.max").read_text().split()
        else:  # version 1
            words = [(root / "cpu" / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")]
        granted, period = float(words[0].replace("max", "inf")), float(words[1])
    except (OSError, ValueError, IndexError):
        return math.inf
    return granted / period if granted > 0 and period > 0 else math.inf


def busy_elsewhere(cores: set[int], seconds: float, stat: Path = STAT) -> float | None:
    """How many of these cores other processes keep busy, over so many seconds; None where the system does not say."""
    before = _used(cores, stat)
    if before is None:
        return None
    time.sleep(seconds)
    after = _used(cores, stat)
    if after is None or after[0] <= before[0]:
        return None
    return max(0.0, ((after[1] - before[1]) - (after[2] - before[2])) / (after[0] - before[0]))


def _used(cores: set[int], stat: Path) -> tuple[float, float, float] | None:
    """(seconds by now, busy seconds of these cores, those of this process)."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    ticks = 0
    for words in lines:
        if words[0].startswith("cpu") and words[0][3:].isdecimal() and int(words[0][3:]) in cores:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, words[1:9])
            ticks += user + nice + system + irq + softirq + steal
    own = os.times()
    return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system
