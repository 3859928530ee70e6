"""The drop-in schedulers beside the originals: the same model outputs, seeds and options through both."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SHAPE = (2, 3, 8, 8)
PER_STEP = 2e-6
"""Allowed in float32 a step, relative to the largest value: both sides round differently. Measured: 1.2e-6."""


def pair(name: str, /, **config: Any) -> tuple[Any, Any]:
    """(original, ours)."""
    import diffusers

    from diffkern.compat import diffusers as ours

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated algorithms are still there
        return getattr(diffusers, name)(**config), getattr(ours, name)(**config)


def outputs(steps: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Model outputs of a run: made up, so that both runs see the same."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for _ in range(steps)]


def accepts(scheduler: Any, name: str) -> bool:
    return name in inspect.signature(scheduler.step).parameters


def run(
    scheduler: Any,
    steps: int | None,
    x: Tensor,
    *,
    dtype: torch.dtype | None = None,
    channels: int | None = None,
    change: Callable[[int, Tensor], Tensor] | None = None,
    seed: Any = 5,
    timesteps: list[int] | None = None,
    limit: int | None = None,
    **options: Any,
) -> list[Any]:
    """The results of each step. ``change(i, x)`` alters the state between steps, as inpainting does."""
    if timesteps is not None:
        scheduler.set_timesteps(timesteps=timesteps)
    elif steps is not None:
        scheduler.set_timesteps(steps)
    times = scheduler.timesteps[:limit]
    shape = (x.shape[0], channels or x.shape[1], *x.shape[2:])
    if accepts(scheduler, "generator") and seed is not None:
        made = [torch.Generator().manual_seed(s) for s in (seed if isinstance(seed, list) else [seed])]
        options["generator"] = made if isinstance(seed, list) else made[0]
    found = []
    for i, (t, m) in enumerate(zip(times, outputs(len(times), shape, dtype or x.dtype), strict=True)):
        result = scheduler.step(m, t, x, **options)
        found.append(result)
        x = result.prev_sample
        if change is not None:
            x = change(i, x)
    return found


def check_runs(original: list[Any], ours: list[Any], what: str = "", per_step: float = PER_STEP) -> float:
    """Asserts that two runs agree; the states that the original made NaN (and what follows) must be finite in ours.
    Returns the worst difference a step."""
    worst = 0.0
    for i, (a, b) in enumerate(zip(original, ours, strict=True)):
        assert type(a).__name__ == type(b).__name__
        a, b = a.prev_sample, b.prev_sample
        assert (b.dtype, b.shape) == (a.dtype, a.shape), what
        assert bool(b.isfinite().all()), f"{what}: not finite at step {i}"
        if not a.isfinite().all():
            break
        difference = float((a - b).abs().max() / a.abs().max()) / (i + 1)
        worst = max(worst, difference)
        assert difference <= per_step, f"{what}: {difference:.3g} a step at step {i}"
    return worst


class Dispatched(TorchDispatchMode):
    """Counts every op that is dispatched, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[f"{func.namespace}.{func._opname}"] += 1
        return func(*args, **(kwargs or {}))


def same_error(call: Callable[[Any], Any], original: Any, ours: Any) -> str:
    """Both raise the same exception with the same text; returns the text."""
    raised = []
    for scheduler in (original, ours):
        try:
            call(scheduler)
        except Exception as error:
            raised.append((type(error), str(error)))
        else:
            raised.append((type(None), "nothing raised"))
    assert raised[0] == raised[1], raised
    assert raised[0][0] is not type(None)
    return raised[0][1]
