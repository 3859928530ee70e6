"""How diffusers' schedulers in sigma are used, and ours in their place: timesteps, random numbers, plans, errors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import (
    ANCESTRAL,
    EDM,
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
from helpers.lazy import Lazy, needs
from torch import Tensor

import diffkern

pytestmark = needs("diffusers")
diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")

NAMES = SIGMA_NAMES
MINIMAL = {FLOW: {"shift": 2.0}, FLOW_HEUN: {"shift": 2.0}}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_dispatches_one_op(name: str) -> None:
    """And nothing else: no zero-dim op, no device read; the noise of rng="torch" is a draw of torch's."""
    _, mine = pair(name, {}, 6)
    x, generator = start(mine), torch.Generator().manual_seed(0)
    kwargs = options(mine, {}, generator)
    for i, t in enumerate(mine.timesteps):
        shown = scaled(mine, x, t)
        m = network(shown, t)
        with AllOps() as step:
            after = mine.step(m, t, x, return_dict=False, **kwargs)[0]
        with AllOps() as scale:
            scaled(mine, after, t)
        if i > 3:  # the tables are made: four of them for the linear multistep method
            draw = {"aten.randn.generator": 1} if name == ANCESTRAL else {}
            assert step.names == {"diffkern.step.default": 1, **draw}
            assert i + 1 == len(mine.timesteps) or scale.names == {}  # the step made it; nothing follows the last one
        x = after


@pytest.mark.parametrize("name", NAMES)
def test_timesteps_of_every_kind(name: str) -> None:
    """Views of `timesteps`, copies of them, [1], and Python floats start a loop at the same step."""
    theirs, mine = pair(name, {}, 6)
    x = start(theirs)
    for at in (0, 2, 4):
        for kind in (lambda t: t, lambda t: t.clone(), lambda t: t[None].clone(), float, lambda t: t.expand(2)):
            found = []
            for scheduler in (theirs, mine):
                scheduler.set_timesteps(6)
                t = scheduler.timesteps[at]
                given = kind(t)
                if scheduler is theirs and isinstance(given, Tensor):
                    given = t  # theirs takes no [2]
                shown = scaled(scheduler, x, given)
                kwargs = options(scheduler, {}, torch.Generator().manual_seed(2))
                found.append(scheduler.step(network(shown, t), given, x, return_dict=False, **kwargs)[0])
            assert mine.step_index == theirs.step_index
            assert distance(found[1], found[0], x) < 2e-6


@pytest.mark.parametrize(
    ("name", "call"),
    [*[(n, {}) for n in (EULER, ANCESTRAL, EDM, FLOW)], *[(n, {"s_churn": 2.0}) for n in (EULER, EDM)]],
)
def test_a_timestep_for_every_sample(name: str, call: dict[str, Any]) -> None:
    """[B] while no loop is under way: each sample is at a step of its own, and the scheduler keeps no state."""
    _, mine = pair(name, {}, 6)
    mine.diffkern(rng="counter", seeds=torch.tensor([5, 6, 7]))
    x = start(mine, (3, 3, 4, 4))
    at = [4, 0, 2]
    t = mine.timesteps[at]
    shown = scaled(mine, x, t)
    m = network(x, 0)
    together = mine.step(m, t, x, return_dict=False, **call)[0]
    assert mine.step_index is None
    for b, i in enumerate(at):
        alone = getattr(ours, name)().diffkern(rng="counter", seeds=torch.tensor([5 + b]))
        alone.set_timesteps(6)
        one = slice(b, b + 1)
        assert torch.equal(scaled(alone, x[one], alone.timesteps[i]), shown[one])
        assert torch.equal(alone.step(m[one], alone.timesteps[i], x[one], return_dict=False, **call)[0], together[one])
    with pytest.raises(IndexError):
        mine.step(m, torch.tensor([1.5, 2.5, 3.5]), x)


@pytest.mark.parametrize("name", NAMES)
def test_a_device_s_timesteps_are_found_without_a_read(name: str) -> None:
    """The search that runs on a device, here on the CPU: the original's choice among equal timesteps, -1 for none."""
    theirs, mine = pair(name, {}, 6)
    mine._engine.search(mine, mine.timesteps, torch.device("cpu"))
    with AllOps() as count:
        found = mine._engine.search(mine, mine.timesteps.flip(0), torch.device("cpu"))
    assert found.tolist() == [theirs.index_for_timestep(t) for t in theirs.timesteps.flip(0)]
    assert not [op for op in count.names if "item" in op or "_local_scalar_dense" in op or "nonzero" in op]
    assert mine._engine.search(mine, torch.tensor([-3.5]), torch.device("cpu")).tolist() == [-1]


@pytest.mark.parametrize("name", [HEUN, LMS, FLOW_HEUN])
def test_schedulers_with_a_memory_take_one_timestep(name: str) -> None:
    _, mine = pair(name, {}, 6)
    x = start(mine)
    with pytest.raises(ValueError, match=f"one for all samples, as {name} remembers earlier steps, got shape"):
        mine.step(x, mine.timesteps[[0, 2]], x)


def test_per_token_noise_by_address() -> None:
    """rng="counter": of the sample, not of its batch, and new at every step."""
    x, tokens = torch.zeros(2, 6, 4), torch.full((2, 6), 900.0)
    found = []
    for pick in (slice(None), slice(1, 2)):
        _, mine = pair(FLOW, {"stochastic_sampling": True}, 5)
        mine.diffkern(rng="counter", seeds=torch.tensor([3, 4])[pick])
        for t in mine.timesteps[:2]:
            step = mine.step(x[pick], t, x[pick], per_token_timesteps=tokens[pick], return_dict=False)
            found.append(step[0][-1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", NAMES)
def test_counter_noise_is_the_sample_s_own(name: str) -> None:
    """rng="counter": a sample alone has the bits that it has in a batch, and nobody's generator moves."""
    call = {} if name in (ANCESTRAL, HEUN, LMS) else {"s_churn": 2.0}
    config = {"stochastic_sampling": True} if name == FLOW else {}
    before = torch.get_rng_state()
    runs = []
    for pick in (slice(None), slice(1, 2)):
        _, mine = pair(name, config, 4)
        mine.diffkern(rng="counter", seeds=diffkern.seeds(3, 2)[pick])
        x = start(mine)[pick]
        for t in mine.timesteps:
            x = mine.step(network(scaled(mine, x, t), t), t, x, return_dict=False, **call)[0]
        runs.append(x)
    assert torch.equal(runs[0][1:], runs[1])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_runs_the_same_steps(name: str) -> None:
    """Several loops at once: the plan is the scheduler without its state."""
    call = {"s_churn": 2.0} if name in (EULER, EDM) else {}
    config = {"stochastic_sampling": True} if name == FLOW else MINIMAL.get(name, {})
    _, mine = pair(name, config, 5)
    seeds = torch.tensor([4, 5])
    mine.diffkern(rng="counter", seeds=seeds)
    plan = mine.plan(**call)
    x = start(mine)
    planned = diffkern.sample(lambda y, t: network(y, t[0]), x, plan, seeds=seeds)
    assert plan == diffkern.Plan.from_json(plan.to_json())
    for t in mine.timesteps:
        x = mine.step(network(scaled(mine, x, t), t), t, x, return_dict=False, **call)[0]
    assert distance(planned, x, x) < 5e-6
    assert abs(plan.init_scale - float(getattr(mine, "init_noise_sigma", 1.0))) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_gradients_flow(name: str) -> None:
    """Through a whole run, as through the original's."""
    found = []
    for scheduler in pair(name, {}, 3):
        x = start(scheduler).requires_grad_()
        y = x
        kwargs = options(scheduler, {}, torch.Generator().manual_seed(2))
        for t in scheduler.timesteps:
            y = scheduler.step(network(scaled(scheduler, y, t), t), t, y, return_dict=False, **kwargs)[0]
        found.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert distance(found[1], found[0], found[0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_original_but_for_the_steps(name: str, tmp_path: Path) -> None:
    """Signatures, config, saved files, `compatibles` and `from_config`, both ways."""
    original, drop_in = getattr(diffusers, name), getattr(ours, name)
    for method in ("step", "add_noise", "scale_noise", "scale_model_input", "get_velocity", "set_timesteps"):
        if hasattr(original, method):
            theirs = inspect.signature(getattr(original, method)).parameters
            mine = inspect.signature(getattr(drop_in, method)).parameters
            assert [(p.name, p.default, p.kind) for p in mine.values()] == [
                (p.name, p.default, p.kind) for p in theirs.values()
            ]
    theirs, mine = original(**MINIMAL.get(name, {})), drop_in(**MINIMAL.get(name, {}))
    assert mine.config == theirs.config
    config = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
    mine.diffkern(rng="counter", exact=True)
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [json.loads((tmp_path / who / "scheduler_config.json").read_text()) for who in ("mine", "theirs")]
    assert files[0] == files[1]
    loaded = original.from_pretrained(tmp_path / "mine").config
    assert {key: loaded[key] for key in config} == config
    assert isinstance(drop_in.from_pretrained(tmp_path / "theirs"), drop_in)
    assert isinstance(drop_in.from_config(theirs.config), original)
    assert {c.__name__ for c in mine.compatibles} == {c.__name__ for c in theirs.compatibles}
    assert len(mine) == len(theirs)


@pytest.mark.parametrize("name", NAMES)
def test_errors_and_warnings_are_the_original_s(name: str) -> None:
    theirs, mine = pair(name, {}, 4)
    x = start(theirs)

    def both(act: Any) -> None:
        texts = []
        for scheduler in (theirs, mine):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                act(scheduler)
            texts.append((caught.type, str(caught.value)))
        assert texts[0] == texts[1]

    if name not in (HEUN, LMS):
        both(lambda s: s.step(x, 3, x))
        both(lambda s: s.step(x, torch.tensor([1, 2]), x))
    both(lambda s: s.step(x, 12.345, x))  # no timestep of the schedule
    for scheduler in (theirs, mine):
        scheduler._step_index = len(scheduler.sigmas) - 1
    both(lambda s: s.step(x, s.timesteps[0], x))  # past the end
    if name == ANCESTRAL:  # without having drawn noise
        generator = torch.Generator().manual_seed(3)
        state = generator.get_state()
        both(lambda s: s.step(x, s.timesteps[0], x, generator=generator))
        assert torch.equal(generator.get_state(), state)
    if "prediction_type" in theirs.config:
        theirs, mine = pair(name, {}, 4)
        for scheduler in (theirs, mine):
            scheduler.register_to_config(prediction_type="wrong")
        both(lambda s: s.step(x, s.timesteps[0], x))
    if name == ANCESTRAL:
        theirs, mine = pair(name, {"prediction_type": "sample"}, 4)
        both(lambda s: s.step(x, s.timesteps[0], x))


def test_a_changed_schedule_is_seen() -> None:
    """New sigmas, in place or not, and a changed config make new tables."""
    theirs, mine = pair(EULER, {}, 4)
    x = start(theirs)
    for change in (
        lambda s: s.sigmas.mul_(0.5),
        lambda s: setattr(s, "sigmas", s.sigmas * 0.7),
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: s.set_timesteps(7),
    ):
        found = []
        for scheduler in (theirs, mine):
            change(scheduler)
            scheduler._step_index = 1
            found.append(scheduler.step(x.tanh(), scheduler.timesteps[1], x).prev_sample)
        assert distance(found[1], found[0], x) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_user_s_modes_do_not_stay_in_the_tables(name: str) -> None:
    """Steps under another default device, and a loop under inference_mode before one that is differentiated."""
    _, mine = pair(name, {}, 4)
    x, runs = start(mine), []
    for mode in (torch.inference_mode(), torch.device("meta"), torch.enable_grad()):
        mine.set_timesteps(4)
        kwargs = options(mine, {}, torch.Generator("cpu").manual_seed(0))
        y = x.clone()
        with mode:
            for t in mine.timesteps:
                y = mine.step(0.1 * scaled(mine, y, t), t, y, return_dict=False, **kwargs)[0]
        runs.append(y)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
    y = x.clone().requires_grad_()
    mine.set_timesteps(4)
    mine.step(y, mine.timesteps[0], y).prev_sample.sum().backward()
    assert y.grad is not None


def test_noncontiguous_samples() -> None:
    for name in NAMES:
        theirs, mine = pair(name, {}, 4)
        x = start(theirs, (4, 3, 6, 8)).transpose(2, 3)[::2]
        m = network(x, 3).to(memory_format=torch.channels_last)
        t = theirs.timesteps[0]
        scaled(theirs, x, t), scaled(mine, x, t)
        found = [
            s.step(m, t, x, **options(s, {}, torch.Generator().manual_seed(0))).prev_sample for s in (theirs, mine)
        ]
        assert distance(found[1], found[0], x) < 2e-6
