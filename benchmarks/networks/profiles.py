"""Where an evaluation's time goes, by kind of op, and how near its convolutions and products are to the machine's rate.

Times are those of torch's profiler on the calling thread, each op without the ops that it calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alone import reason
from benchmarks.networks.contenders import NAMES, contenders
from benchmarks.networks.peers import NETWORKS, Network
from benchmarks.run import gemm_rate

__all__ = ["KINDS", "Profile", "kind_of", "profile_of", "profiles"]

BETWEEN = "between ops"
"""Python, modules and dispatch: the evaluation without its ops."""
KINDS = ("convolution", "attention", "linear", "norm + act", "copies", "adds", "other", BETWEEN)
LARGEST = 8
_WORDS = {
    "convolution": ("convolution", "conv2d", "conv1d", "conv"),
    "attention": ("scaled_dot_product", "attention", "bmm", "baddbmm", "softmax"),
    "linear": ("addmm", "mm", "linear"),
    "norm + act": ("norm", "silu", "gelu", "sigmoid", "mish"),
    "copies": ("copy", "cat", "clone", "contiguous", "pad", "upsample", "fill", "zero"),
    "adds": ("add", "mul", "div", "sub", "mean", "sum", "avg_pool"),
}
"""What the name of an op has in it, the first kind that fits."""


def kind_of(name: str) -> str:
    """The kind of an op by its name in the profiler ("aten::copy_", "diffkern::attention")."""
    space, _, op = name.rpartition("::")
    if space not in ("aten", "diffkern"):
        return "other"
    return next((kind for kind, words in _WORDS.items() if any(word in op for word in words)), "other")


@dataclass(frozen=True)
class Profile:
    """Of one contender: seconds of an evaluation, by kind, and operations of its convolutions and products."""

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    others: tuple[tuple[str, float], ...] = ()
    """The largest ops that are neither convolution, attention nor linear, with their share."""
    limit: float | None = None
    """Operations a second that matrix products reach alone."""
    why: str = ""

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def share(self, kind: str) -> float:
        return self.seconds.get(kind, 0.0) / self.total if self.total else 0.0

    def rate(self, kind: str) -> float | None:
        """Operations a second while such ops run, as a share of the limit; None where they were not counted."""
        seconds, flops = self.seconds.get(kind, 0.0), self.flops.get(kind, 0)
        return flops / seconds / self.limit if seconds and flops and self.limit else None


def profiles(
    name: str | Network,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    wanted: Sequence[str] = NAMES,
    times: int = 3,
) -> list[Profile]:
    """Of an evaluation of each contender, the mean of ``times`` after one that is not counted."""
    network = NETWORKS[name] if isinstance(name, str) else name
    given, found = network.inputs(batch), []
    limit = gemm_rate(str(dtype).removeprefix("torch."), torch.get_num_threads())
    for one in contenders(network, network.build().to(dtype), wanted):
        if one.model is None:
            found.append(Profile(one.name, why=one.why))
            continue
        x = given.to(dtype, one.layout)
        try:
            with torch.no_grad():
                profiled = profile_of(one.name, functools.partial(one.run, x), times)
            found.append(replace(profiled, limit=limit))
        except Exception as failed:  # its row says why, the others run
            found.append(Profile(one.name, why=reason(failed)))
    return found


def profile_of(name: str, call: Callable[[], object], times: int) -> Profile:
    """Of any call."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops: dict[str, int] = {}
    for op, number in counter.get_flop_counts()["Global"].items():
        kind = kind_of(f"aten::{str(op).rpartition('.')[2]}")
        flops[kind] = flops.get(kind, 0) + number
    with profile(activities=[ProfilerActivity.CPU]) as prof:
        for _ in range(times):
            with record_function(BETWEEN):
                call()
    seconds: dict[str, float] = {}
    small: dict[str, float] = {}
    for event in prof.key_averages():
        took = event.self_cpu_time_total * 1e-6 / times
        kind = BETWEEN if event.key == BETWEEN else kind_of(event.key)
        seconds[kind] = seconds.get(kind, 0.0) + took
        if kind not in ("convolution", "attention", "linear"):
            small[event.key] = took
    total = sum(seconds.values())
    largest = sorted(small.items(), key=lambda item: -item[1])[:LARGEST]
    return Profile(name, seconds, flops, tuple((op, took / total) for op, took in largest))
