"""What a case of the benchmarks is: what is timed, against what, how it is checked; and what the cases share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern import ops, reference

__all__ = [
    "Baseline",
    "Case",
    "Check",
    "Setting",
    "bytes_of",
    "compare",
    "cpu_target",
    "job_seeds",
    "loose",
    "random_tensor",
    "reference_noise",
    "tight",
    "try_compile",
]

Fn = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where cases run. `compiled`: also time torch.compile of the eager baselines."""

    device: str = "cpu"
    compiled: bool = True

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Baseline:
    """`target`: time(baseline) / time(ours) must reach it. `fn` None: not available, `note` says why."""

    name: str
    fn: Fn | None
    target: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """The largest error of `what`, in units of 1 + |value|, and the most it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Case:
    """One comparison: `bytes` is what an update has to read and write, `steps` the updates in a call of `ours`."""

    name: str
    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Fn
    baselines: tuple[Baseline, ...]
    check: Callable[[], list[Check]]
    bytes: int
    goal_us: float | None = None
    steps: int = 1
    grad: bool = False
    overhead: bool = False
    """Whether the call overhead is the point: on a GPU the host's time then counts too."""
    counted: bool = False
    """Whether dispatched ops and peak memory are of interest beside the time."""
    flops: int = 0
    """Operations of its matrix products, where these are what takes the time; their rate is measured beside it."""


# ----------------------------------------------------------------------------------------------------- helpers
def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def random_tensor(seed: int, shape: tuple[int, ...], setting: Setting, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(setting.device, dtype)


def compare(what: str, got: Tensor, want: Tensor, tolerance: float) -> Check:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error = float(((got - want).abs() / (1 + want.abs())).max()) if got.shape == want.shape else math.inf
    return Check(what, error, tolerance)


def tight(dtype: torch.dtype) -> float:
    """Ours rounds once, from float32 arithmetic with a handful of operations."""
    return 4e-6 if dtype == torch.float32 else float(torch.finfo(dtype).eps)


def loose(dtype: torch.dtype) -> float:
    """What a baseline may be off: float32 coefficients and a rounding after every operation."""
    return 1e-4 if dtype == torch.float32 else 8 * float(torch.finfo(dtype).eps)


def try_compile(fn: Callable[..., Any], setting: Setting, *args: Any) -> tuple[Callable[..., Any] | None, str]:
    """torch.compile of fn, warmed up; None and the reason where it cannot be had."""
    if not setting.compiled:
        return None, "not asked for"
    try:
        built = torch.compile(fn, dynamic=False)
        built(*args)
    except Exception as error:  # no C++ compiler, an unsupported platform: the other baselines stand
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"torch.compile failed: {lines[0][:120]}"
    return built, ""


def cpu_target(value: float | None, setting: Setting) -> float | None:
    return value if setting.cpu else None


def job_seeds(batch: int, setting: Setting) -> Tensor:
    return ops.seeds(1, batch, device=setting.device)


@functools.lru_cache(maxsize=4)
def reference_noise(shape: tuple[int, ...], stream: int) -> Tensor:
    """The normals of `job_seeds` on a stream, float64, computed once for all the cases that check against them."""
    return reference.randn(shape, ops.seeds(1, shape[0]), stream)
