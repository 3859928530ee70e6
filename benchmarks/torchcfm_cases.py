"""torchcfm's matchers, a batch each: the installed original against `diffkern.compat.torchcfm`.

Times and noise are drawn as the original draws them. In the cases "-given" both have the noise already, and the pairs:
what is timed is what makes x_t and u_t.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor
from diffkern.compat import torchcfm

__all__ = ["TABLE", "matcher"]

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "cfm": ("ConditionalFlowMatcher", {}),
    "cfm-sigma": ("ConditionalFlowMatcher", {"sigma": 0.1}),
    "target": ("TargetConditionalFlowMatcher", {}),
    "vp": ("VariancePreservingConditionalFlowMatcher", {"sigma": 0.1}),
    "bridge": ("SchrodingerBridgeConditionalFlowMatcher", {"sigma": 0.5}),
    "ot": ("ExactOptimalTransportConditionalFlowMatcher", {}),
}


def matcher(
    name: str, setting: Setting, shape: tuple[int, ...], kind: str, given: bool = False, goal: float | None = None
) -> Case:
    """One batch of a training loop. With given noise the pairs are given too: no transport plan is made."""
    cls, options = KINDS[kind]
    x0, x1, z = (random_tensor(k, shape, setting) for k in range(3))

    def run(make: Any) -> Callable[[], tuple[Tensor, ...]]:
        flow = make(**options)
        if not given:
            return lambda: flow.sample_location_and_conditional_flow(x0, x1)
        if hasattr(flow, "ot_sampler"):
            flow.ot_sampler.sample_plan = lambda x0, x1: (x0, x1)
        flow.sample_noise_like = lambda x: z
        return lambda: flow.sample_location_and_conditional_flow(x0, x1)

    ours = run(getattr(torchcfm, cls))
    theirs: Callable[[], tuple[Tensor, ...]] | None = None
    if importlib.util.find_spec("torchcfm") is not None:
        from torchcfm import conditional_flow_matching

        theirs = run(getattr(conditional_flow_matching, cls))
    note = "" if theirs is not None else "not installed: torchcfm"

    def check() -> list[Check]:
        import numpy as np

        if theirs is None:
            return [compare("ours", ours()[1], ours()[1], float("inf"))]
        found = []
        with mock.patch("torch.rand", return_value=torch.linspace(0.1, 0.9, shape[0])):
            for run in (ours, theirs):
                torch.manual_seed(3)
                np.random.seed(3)
                found.append(run())
        pairs = zip(("x_t", "u_t"), found[0][1:], found[1][1:], strict=True)
        return [compare(f"ours {what}", a, b, loose(a.dtype)) for what, a, b in pairs]

    return Case(
        name,
        f"{cls}{', noise given' if given else ''}",
        shape,
        x0.dtype,
        ours,
        (Baseline("torchcfm", theirs, cpu_target(goal, setting), note),),
        check,
        bytes_of(x0, x1, x0, x1) + (0 if kind == "cfm" else bytes_of(z)),
        overhead=shape == SMALL,
    )


def _table() -> dict[str, tuple[Callable[..., Case], dict[str, Any]]]:
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {}
    for size, shape in (("small", SMALL), ("large", LARGE)):
        for kind in KINDS:
            table[f"torchcfm-{kind}-{size}"] = (matcher, {"shape": shape, "kind": kind})
            table[f"torchcfm-{kind}-given-{size}"] = (
                matcher,
                {"shape": shape, "kind": kind, "given": True, "goal": 3.0 if size == "large" else None},
            )
    return table


TABLE = _table()
