"""The short way of a step that repeats the last one's: what it may take for granted, and what it has to notice."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import (
    EULER,
    FLOW,
    FLOW_HEUN,
    HEUN,
    LMS,
    SIGMA_NAMES,
    AllOps,
    distance,
    network,
    options,
    pair,
    scaled,
    start,
)
from helpers.lazy import needs
from torch import Tensor

pytestmark = needs("diffusers")

KARRAS = [name for name in SIGMA_NAMES if name not in (FLOW, FLOW_HEUN)]
TIMES = ("DDIMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepScheduler", "DEISMultistepScheduler")


def one_step(scheduler: Any, x: Tensor, i: int, generator: torch.Generator) -> Tensor:
    t = scheduler.timesteps[i]
    shown = scaled(scheduler, x, t)
    kwargs = options(scheduler, {}, generator)
    result: Tensor = scheduler.step(network(shown, t), t, x, return_dict=False, **kwargs)[0]
    return result


@pytest.mark.parametrize("name", KARRAS)
def test_the_next_model_input_comes_with_the_step(name: str) -> None:
    """The same bits as an op of its own gives; one of its own where the sample is another or was written to."""
    _, mine = pair(name, {}, 8)
    x, generator = start(mine), torch.Generator().manual_seed(0)
    last = len(mine.timesteps) - 1
    for i, t in enumerate(mine.timesteps):
        alone = copy.copy(mine)
        alone._engine.ahead = None
        with AllOps() as scale:
            shown = mine.scale_model_input(x, t)
        assert torch.equal(shown, alone.scale_model_input(x, t))
        assert scale.names["diffkern.step.default"] == (i in (0, 1, 4, 5, 6))
        x = mine.step(network(shown, t), t, x, return_dict=False, **options(mine, {}, generator))[0]
        assert (mine._engine.ahead is None) == (i == last)  # nothing is kept after a loop
        if i == 3:
            x = x.clone()  # not what the step returned: the next step makes no input
        if i == 5:
            x.mul_(1.5)


@pytest.mark.parametrize("name", KARRAS)
def test_loops_that_double_the_batch_make_no_input_in_the_step(name: str) -> None:
    """Guidance scales [x, x]: such a loop pays for nothing that it does not use."""
    _, mine = pair(name, {}, 6)
    x, generator = start(mine), torch.Generator().manual_seed(0)
    for t in mine.timesteps:
        shown = mine.scale_model_input(torch.cat([x, x]), t)
        x = mine.step(network(shown, t)[: len(x)], t, x, return_dict=False, **options(mine, {}, generator))[0]
        assert not mine._engine.scales_next
        assert mine._engine.ahead is None or mine._engine.ahead[3] is None


@pytest.mark.parametrize("name", SIGMA_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_short_way_has_the_bits_of_the_long_one(name: str, dtype: torch.dtype) -> None:
    """Both calls of Heun's step are repeated, each with its own rows."""
    _, mine = pair(name, {}, 6)
    _, slow = pair(name, {}, 6)
    states, generators = [start(mine).to(dtype)] * 2, [torch.Generator().manual_seed(4) for _ in range(2)]
    for t, u in zip(mine.timesteps, slow.timesteps, strict=True):
        for at in ("hot", "calls", "scales"):
            slow._engine.__dict__.pop(at, None)
        shown, said = scaled(mine, states[0], t), scaled(slow, states[1], u)
        assert torch.equal(shown, said)
        results = [
            scheduler.step(network(said, t), time, x, return_dict=False, **options(mine, {}, generator))
            for scheduler, time, x, generator in zip((mine, slow), (t, u), states, generators, strict=True)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        states = [result[0] for result in results]
        if name == HEUN and mine.dt is not None:
            assert mine.dt == slow.dt == mine.sigmas[mine.step_index] - mine.sigmas[mine.step_index - 1]
            assert torch.equal(mine.prev_derivative, slow.prev_derivative)
            assert torch.equal(mine.sample, slow.sample)
            assert mine.sample.dtype is mine.prev_derivative.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_call_of_heuns_is_one_op_and_what_rounds_its_x0(dtype: torch.dtype) -> None:
    _, mine = pair(HEUN, {}, 6)
    x = start(mine).to(dtype)
    for i, t in enumerate(mine.timesteps):
        with AllOps() as scale:
            mine.scale_model_input(x, t)
        with AllOps() as step:
            x = mine.step(x, t, x, return_dict=False)[0]
        if i > 1:
            assert sum(scale.names.values()) == (0 if dtype is torch.float32 else 1)
            assert step.names["diffkern.step.default"] == 1
            assert sum(step.names.values()) == (1 if dtype is torch.float32 else 2)


@pytest.mark.parametrize("name", SIGMA_NAMES)
def test_the_same_levels_again_are_the_same_to_the_tables(name: str) -> None:
    """What a loop was run with serves the next one, at the cost of a look at its numbers; other levels are other."""
    _, mine = pair(name, {}, 6)
    found = mine._engine.sources(mine)[0]
    assert found.numbers == mine.sigmas.tolist() == found.values.tolist()
    before = mine.sigmas
    mine.set_timesteps(6)
    assert mine.sigmas is not before
    assert mine._engine.sources(mine)[0] is found
    mine.sigmas.mul_(0.5)
    other = mine._engine.sources(mine)[0]
    assert other is not found
    assert other.numbers == [sigma / 2 for sigma in found.numbers]


@pytest.mark.parametrize("name", SIGMA_NAMES)
def test_changed_levels_are_seen(name: str) -> None:
    """Other sigmas, sigmas written to in place, and another config, between the steps of a loop."""
    both = pair(name, {}, 9)
    x = start(both[0])
    states, generators = [x, x], [torch.Generator().manual_seed(4) for _ in both]
    for i in range(9):
        before = states[0]
        for k, scheduler in enumerate(both):
            if i == 2:  # not between the two calls of a step of Heun's
                scheduler.sigmas = scheduler.sigmas * 1.125
            if i == 4:
                scheduler.sigmas.mul_(0.75)
            if i == 6 and name == EULER:
                scheduler.register_to_config(prediction_type="v_prediction")
            states[k] = one_step(scheduler, before if k == 0 else states[1], i, generators[k])
        assert distance(states[1], states[0], before) < 2e-6 * (i + 1)


@pytest.mark.parametrize("name", TIMES)
def test_changed_tables_are_seen(name: str) -> None:
    """Other tables, tables written to, timesteps written to, another config, between the steps of a loop."""
    both = pair(name, {"clip_sample": False} if "DDIM" in name else {}, 9)
    x = start(both[0])
    states, generators = [x, x], [torch.Generator().manual_seed(4) for _ in both]
    for i in range(9):
        before = states[0]
        for k, scheduler in enumerate(both):
            if i == 2 and "DDIM" in name:
                scheduler.alphas_cumprod = scheduler.alphas_cumprod * 0.875
            if i == 3 and "Multistep" in name:
                scheduler.sigmas = scheduler.sigmas * 1.125
            if i == 4 and "DDIM" in name:
                scheduler.alphas_cumprod.mul_(0.9375)
                scheduler.timesteps[5:] += 7
            if i == 4 and "Multistep" in name:
                scheduler.sigmas.mul_(0.9375)
            if i == 6:
                scheduler.register_to_config(prediction_type="v_prediction")
            states[k] = one_step(scheduler, states[k], i, generators[k])
        assert distance(states[1], states[0], before) < 2e-6 * (i + 1)


@pytest.mark.parametrize("name", [*SIGMA_NAMES, *TIMES])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_alone(name: str, how: Any) -> None:
    """A copy made in the middle of a loop ends where the original ends, whichever goes first."""
    if how is copy.copy and (name == LMS or "Multistep" in name):
        pytest.skip("shallow copies share the list of earlier estimates, as in the original")
    _, mine = pair(name, {}, 6)
    x, generator = start(mine), torch.Generator().manual_seed(0)
    for i in range(4):
        x = one_step(mine, x, i, generator)
    other, state = how(mine), generator.get_state()
    ends = []
    for scheduler in (other, mine):
        generator.set_state(state)
        y = x.clone()
        for i in range(4, len(scheduler.timesteps)):
            y = one_step(scheduler, y, i, generator)
        ends.append(y)
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", [*SIGMA_NAMES, *TIMES])
def test_gradients_and_other_shapes_in_the_middle_of_a_loop(name: str) -> None:
    """Operands that the short way cannot take go the long way: gradients, broadcasting, wider dtypes."""
    both = pair(name, {}, 8)
    generators = [torch.Generator().manual_seed(4) for _ in both]
    states = [start(both[0]) for _ in both]
    for i in range(7):
        grads, before = [], states[0]
        for k, scheduler in enumerate(both):
            t, x = scheduler.timesteps[i], states[k]
            shown = scaled(scheduler, x, t)
            m = network(shown, t).detach()
            if i == 3:
                x = x.clone().requires_grad_()
            if i == 5 and name in ("DDIMScheduler", EULER, FLOW):
                m = m[:1]
            after = scheduler.step(m, t, x, return_dict=False, **options(scheduler, {}, generators[k]))[0]
            if i == 3:
                grads.append(torch.autograd.grad(after.sum(), x)[0])
            states[k] = after.detach()
        if i == 3:
            assert distance(grads[1], grads[0], grads[0]) < 1e-5
        assert distance(states[1], states[0], before) < 2e-6 * (i + 1)
