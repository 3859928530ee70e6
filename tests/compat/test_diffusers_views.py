"""One scheduler for several views: a pipeline swaps the state of each in and out through ``__dict__`` (panoramas)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import STEP_TOLERANCE, diffusers, ours
from torch import Tensor

NAMES = ["DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler"]
NAMES += ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"]
State = dict[str, Any]


def with_lists_of_its_own(state: State) -> State:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def views(scheduler: Any, copied: Callable[[State], State]) -> list[Tensor]:
    """Two views in turn, each with a copy of the scheduler's state of its own."""
    scheduler.set_timesteps(4)
    draw = lambda seed: torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    states = [copied(scheduler.__dict__) for _ in range(2)]
    xs = [draw(7), draw(8)]
    for i, t in enumerate(list(scheduler.timesteps)):
        for view in range(2):
            scheduler.__dict__.update(states[view])
            x = scheduler.scale_model_input(xs[view], t) if hasattr(scheduler, "scale_model_input") else xs[view]
            xs[view] = scheduler.step(draw(9 * i + view) + 0.0 * x, t, xs[view], return_dict=False)[0]
            states[view] = copied(scheduler.__dict__)
    return xs


@pytest.mark.parametrize("copied", [copy.deepcopy, with_lists_of_its_own], ids=["deepcopy", "lists"])
@pytest.mark.parametrize("name", NAMES)
def test_views_are_as_the_original_makes_them(name: str, copied: Callable[[State], State]) -> None:
    theirs, mine = (views(getattr(module, name)(), copied) for module in (diffusers, ours))
    for a, b in zip(theirs, mine, strict=True):
        # The size of what is added up; UniPC's and DPM-Solver's weights are the originals' float32.
        torch.testing.assert_close(b, a, rtol=0, atol=100 * STEP_TOLERANCE * float(a.abs().max()))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_subclass_may_say_where_a_loop_starts(name: str) -> None:
    """diffusers' hook `_init_step_index` is asked by steps, as in the original."""
    found = []
    for module in (diffusers, ours):
        original = getattr(module, name)

        class Late(original):
            def _init_step_index(self, timestep: Any) -> None:
                self._step_index = 2

        scheduler = Late()
        scheduler.set_timesteps(5)
        x = torch.ones(1, 3, 2, 2)
        scheduler.scale_model_input(x, scheduler.timesteps[0])
        scheduler.step(x, scheduler.timesteps[0], x)
        found.append(scheduler.step_index)
    assert found == [3, 3]
