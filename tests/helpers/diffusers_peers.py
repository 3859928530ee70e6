"""diffusers' schedulers and ours side by side: the same model outputs, options and generators."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.lazy import Lazy

diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")


EULER, ANCESTRAL, HEUN = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
EDM, LMS = "EDMEulerScheduler", "LMSDiscreteScheduler"
FLOW, FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
SIGMA_NAMES = (EULER, ANCESTRAL, HEUN, EDM, LMS, FLOW, FLOW_HEUN)

STEP_TOLERANCE = 2e-6
"""Of a float32 step, relative to the larger of the states before and after it."""


class AllOps(TorchDispatchMode):
    """Every op that a call dispatches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def pair(name: str, config: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """(theirs, ours) after `set_timesteps` with the remaining arguments."""
    both = getattr(diffusers, name)(**config), getattr(ours, name)(**config)
    for scheduler in both:
        scheduler.set_timesteps(*args, **kwargs)
    return both


def start(scheduler: Any, shape: tuple[int, ...] = (2, 3, 7, 5), seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * getattr(scheduler, "init_noise_sigma", 1.0)


def scaled(scheduler: Any, x: Tensor, t: Any) -> Tensor:
    return scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x


def network(x: Tensor, t: Any) -> Tensor:
    """A model: smooth, bounded, different at every element and time."""
    ramp = torch.linspace(-1, 1, x[0].numel()).reshape(x.shape[1:])
    return torch.tanh(1.3 * x.float() + ramp + 0.1 * torch.as_tensor(t).float() / 1000).to(x.dtype)


def exact_step(theirs: Any, m: Tensor, t: Any, x: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    """The original's step on float64 tensors, with the noise that it would draw for these."""
    module = sys.modules[type(theirs).__module__]
    draw = getattr(module, "randn_tensor", None)

    def same_noise(shape: Any, dtype: torch.dtype, **rest: Any) -> Tensor:
        return draw(shape, dtype=min((dtype, m.dtype), key=lambda d: d.itemsize), **rest).to(dtype)

    with mock.patch.object(module, "randn_tensor", same_noise, create=True):
        return theirs.step(m.double(), t, x.double(), return_dict=False, **kwargs)


def options(scheduler: Any, call: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    draws = "generator" in inspect.signature(scheduler.step).parameters
    return {**call, "generator": generator} if draws else call


def distance(a: Tensor, b: Tensor, scale: Tensor) -> float:
    """max|a - b| relative to the larger of b and the state that it came from; NaN must be where b has it."""
    assert a.dtype == b.dtype, f"{a.dtype}, not {b.dtype}"
    assert a.shape == b.shape, f"{tuple(a.shape)}, not {tuple(b.shape)}"
    assert torch.equal(a.isnan(), b.isnan())
    size = max(scale.abs().max().item(), b.nan_to_num().abs().max().item(), 1e-30)
    return (a.double() - b.double()).nan_to_num().abs().max().item() / size


def compare_runs(name: str, config: dict[str, Any], setup: dict[str, Any], call: dict[str, Any]) -> float:
    """Both schedulers through a whole trajectory, each on its own states and generator; and every step of ours from
    the states of theirs. What a step of theirs itself is off in float32 is allowed to both. Returns the worst distance
    of a step beyond that."""
    theirs, mine = pair(name, config, **setup)
    assert torch.equal(theirs.timesteps, mine.timesteps)
    twin = pair(name, config, **setup)[1]  # ours, on the states of theirs
    x = start(theirs)
    y = x.clone()
    wide = copy.deepcopy(theirs)
    worst, drift, slack = 0.0, 0.0, 0.0
    generators = [torch.Generator().manual_seed(7) for _ in range(4)]
    kwargs = [options(s, call, g) for s, g in zip((theirs, twin, mine, wide), generators, strict=True)]
    for i, t in enumerate(theirs.timesteps):
        shown = scaled(theirs, x, t)
        worst = max(worst, distance(scaled(twin, x, twin.timesteps[i]), shown, shown))
        scaled(wide, x, t)
        m = network(shown, t)
        after = theirs.step(m, t, x, return_dict=False, **kwargs[0])
        single = twin.step(m, twin.timesteps[i], x, return_dict=False, **kwargs[1])
        exact = exact_step(wide, m, t, x, **kwargs[3])
        for ours_, theirs_, exact_ in zip(single, after, exact, strict=True):
            own = distance(theirs_.double(), exact_.double(), x)
            worst, slack = max(worst, distance(ours_, theirs_, x) - own), slack + own
        u = mine.timesteps[i]
        y = mine.step(network(scaled(mine, y, u), u), u, y, return_dict=False, **kwargs[2])[0]
        drift = max(drift, distance(y, after[0], x))
        x = after[0]
        assert mine.step_index == theirs.step_index
    assert torch.equal(generators[0].get_state(), generators[2].get_state()), "other random numbers were consumed"
    assert worst <= STEP_TOLERANCE, f"a step differs by {worst:.3g}"
    assert drift <= STEP_TOLERANCE * len(theirs.timesteps) + slack, f"the run differs by {drift:.3g}"
    return worst
