"""What a call costs beside its time: ops that torch dispatches, and the memory it needs at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Costs", "costs_of", "peak_of"]

# What torch's profiler has to say of itself; for the processes that are started from here.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@dataclass(frozen=True)
class Costs:
    """``ops``: dispatched, a step. ``peak``: bytes allocated at once on top of what was there, over the whole call."""

    ops: float
    peak: int


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        return func(*args, **(kwargs or {}))


def costs_of(call: Callable[[], object], steps: int, device: str) -> Costs:
    """Every op below autograd counts: ours, torch's on whole states, and those on single numbers."""
    call()  # warm: tables, caches
    with _Count() as counted:
        call()
    return Costs(counted.ops / steps, peak_of(call, device))


def peak_of(call: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that torch's allocator holds at once in a call, on top of what was there (oneDNN's scratch is not its)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()  # so that what it leaves behind was allocated under the profiler's eyes
        with record_function("measured"):
            result = call()
    del result
    events = prof.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = next(e.start_ns() for e in events if e.name() == "measured")
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for at, change in changes:
        if at >= begin:
            held += change
            most = max(most, held)
    return most
