"""One scheduler for several views: a pipeline swaps the state of each in and out through ``__dict__`` (panoramas)."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import STEP_TOLERANCE, diffusers, ours
from torch import Tensor

CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")),
    *((name, {}) for name in ("DDIMScheduler", "DDIMInverseScheduler", "DDPMScheduler", "LMSDiscreteScheduler")),
    *((name, {}) for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")),
    *(
        (name, {})
        for name in ("EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
    ),
    *((name, {}) for name in ("RePaintScheduler", "ScoreSdeVeScheduler")),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    *(("UniPCMultistepScheduler", {"solver_order": order}) for order in (1, 3, 4)),
    ("UniPCMultistepScheduler", {"disable_corrector": [1], "thresholding": True}),
    ("UniPCMultistepScheduler", {"predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
]
State = dict[str, Any]
Copy = Callable[[State], State]


def with_lists_of_its_own(state: State) -> State:
    return {name: list(value) if isinstance(value, list) else value for name, value in state.items()}


def pickled(state: State) -> State:
    found: State = pickle.loads(pickle.dumps(state))
    return found


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def one_step(scheduler: Any, m: Tensor, t: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    name = type(scheduler).__name__
    result: Tensor
    if name == "ScoreSdeVeScheduler":
        x = scheduler.step_correct(m, x, generator=generator, return_dict=False)[0]
        result = scheduler.step_pred(m, t, x, generator=generator, return_dict=False)[0]
        return result
    more: dict[str, Any] = {"return_dict": False}
    if name == "RePaintScheduler":
        more |= {"original_image": torch.ones_like(x), "mask": torch.ones_like(x).triu()}
    if "generator" in inspect.signature(scheduler.step).parameters:
        more["generator"] = generator
    result = scheduler.step(m, t, x, **more)[0]
    return result


def views(scheduler: Any, copied: Copy, together: bool) -> list[Tensor]:
    """Two views in turn, each with a copy of the scheduler's state of its own; ``together``: their states are mixed and
    cut anew after each step, as overlapping views are."""
    scheduler.set_timesteps(5)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(5)
    states = [copied(scheduler.__dict__) for _ in range(2)]
    xs, generators = [draw(7), draw(8)], [torch.Generator().manual_seed(view) for view in range(2)]
    for i, t in enumerate(list(scheduler.timesteps)):
        for view in range(2):
            scheduler.__dict__.update(states[view])
            x = scheduler.scale_model_input(xs[view], t) if hasattr(scheduler, "scale_model_input") else xs[view]
            xs[view] = one_step(scheduler, draw(9 * i + view) + 0.0 * x, t, xs[view], generators[view])
            states[view] = copied(scheduler.__dict__)
        if together:
            canvas = torch.cat([xs[0][..., :3], 0.5 * (xs[0][..., 3:] + xs[1][..., :1]), xs[1][..., 1:]], -1)
            xs = [canvas[..., :4], canvas[..., 3:]]
    return xs


@pytest.mark.parametrize("together", [False, True], ids=["apart", "overlapping"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, with_lists_of_its_own], ids=["deepcopy", "pickle", "lists"])
@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=[f"{n[:-9]}-{i}" for i, (n, _) in enumerate(CONFIGS)])
def test_views_are_as_the_original_makes_them(name: str, config: dict[str, Any], copied: Copy, together: bool) -> None:
    theirs, mine = (views(getattr(module, name)(**config), copied, together) for module in (diffusers, ours))
    for a, b in zip(theirs, mine, strict=True):
        # The size of what is added up; UniPC's and DPM-Solver's weights are the originals' float32.
        torch.testing.assert_close(b, a, rtol=0, atol=100 * STEP_TOLERANCE * float(a.abs().max()))


def test_a_copy_knows_a_state_that_was_overwritten_before_it_was_made() -> None:
    """A copy's tensors count their writes anew: what they were when the step read them is found before it is made."""
    ends = []
    for copied in (lambda state: state, pickled, copy.deepcopy):
        scheduler = ours.UniPCMultistepScheduler()
        scheduler.set_timesteps(5)
        x = draw(7)
        out = scheduler.step(draw(1), scheduler.timesteps[0], x).prev_sample
        x.zero_()  # a static buffer
        scheduler.__dict__.update(copied(scheduler.__dict__))
        ends.append(scheduler.step(draw(2), scheduler.timesteps[1], out.clone()).prev_sample)
    for x in ends[1:]:
        torch.testing.assert_close(x, ends[0], rtol=1e-5, atol=1e-5)


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
