"""Models and callbacks that write into what they are given: a model changes no state, a callback changes it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import adaptive_cases
from helpers.oracles import Gaussian, run_plan
from helpers.sampling_cases import COSINE, EDM, FLOW, LINEAR, PLANS, SEEDS, SHAPE, network, start_of
from helpers.sampling_plans import ODD, conditional, near
from torch import Tensor

from diffkern import ops, samplers
from diffkern.plan import Plan
from diffkern.sampling import initial, pc_plan, predictor_corrector, rk45, sample, transition_logprob

RUNS = {
    **{name: PLANS[name] for name in ("ddpm", "ddim", "euler", "heun", "heun_edm", "euler_flow", "heun_flow")},
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 8),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde(LINEAR, 8),
    "unipc": samplers.unipc(COSINE, 8),
    "lms": samplers.lms(LINEAR, 8),
    "repaint": samplers.repaint(LINEAR, 8, jump_length=2, jump_n_sample=2),
    "odd": ODD,
}
CASES = [*((name, False) for name in RUNS), *((name, True) for name in ("ddim", "euler", "dpmpp_2m"))]
WITH_HISTORIES = ("heun", "dpmpp_2m", "dpmpp_3m_sde", "unipc", "lms", "odd")


def drawn(plan: Plan) -> list[Tensor]:
    return [ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64) for row in plan.rows if row.draws]


def scribbling(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
    """`network` or `conditional`, which leaves nothing of the state and time that it was given."""
    m = conditional(x, t, *cond) if cond else network(x, t)
    x.fill_(math.nan)
    t.fill_(-1)
    return m


def halve(info: Any) -> None:
    info["x"].mul_(0.5)


# --- sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "inference"), CASES)
def test_what_a_model_writes_changes_no_state(name, inference):
    plan = RUNS[name]
    x = start_of(plan)
    before = x.clone()
    with torch.inference_mode() if inference else nullcontext():
        got = sample(scribbling, x, plan, seeds=SEEDS)
    assert torch.equal(got, sample(network, before, plan, seeds=SEEDS))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun_flow", "dpmpp_2m", "unipc", "odd"])
def test_a_model_that_writes_from_some_call_on(name):
    """The state that was its input is made again, with a callback's edits of the steps before."""
    plan = RUNS[name]
    x = start_of(plan)
    calls = 0

    def late(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t) if calls < 4 else scribbling(x, t)

    def callback(info: Any) -> None:
        if info["i"] % 2:
            halve(info)

    got = sample(late, x, plan, seeds=SEEDS, callback=callback)
    assert torch.equal(got, sample(network, x, plan, seeds=SEEDS, callback=callback))


def test_a_model_that_returns_the_input_it_writes_into_from_some_call_on():
    plan = RUNS["ddim"]
    x, calls = start_of(plan), 0

    def model(x: Tensor, t: Tensor, late: bool) -> Tensor:
        nonlocal calls
        calls += 1
        return x.mul_(0.5) if late and calls >= 4 else 0.5 * x

    got = sample(lambda x, t: model(x, t, True), x, plan)
    assert torch.equal(got, sample(lambda x, t: model(x, t, False), x, plan))


def test_a_state_that_can_not_be_made_again_is_refused():
    """One output tensor for all calls, and writes from the fourth call on: what the state was made of is gone."""
    plan = RUNS["ddim"]
    x, calls = start_of(plan), 0
    buffer = torch.empty_like(x)

    def model(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        buffer.copy_(network(x, t))
        return buffer if calls < 4 else buffer.add_(x.fill_(0.0))

    with pytest.raises(ValueError, match="model must write into its input from its first call on or never"):
        sample(model, x, plan)


@pytest.mark.parametrize(("name", "inference"), CASES)
def test_what_a_callback_writes_into_the_state_counts_from_there(name, inference):
    plan = RUNS[name]
    x = start_of(plan)
    before = x.clone()
    with torch.inference_mode() if inference else nullcontext():
        got = sample(network, x, plan, seeds=SEEDS, callback=halve)
    near(got, run_plan(plan, network, before, drawn(plan), edit=lambda x: 0.5 * x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["ddim", *WITH_HISTORIES])
def test_what_a_callback_writes_into_x0_changes_nothing(name):
    plan = RUNS[name]
    x = start_of(plan)
    got = sample(network, x, plan, seeds=SEEDS, callback=lambda info: info["x0"].fill_(math.nan))
    assert torch.equal(got, sample(network, x, plan, seeds=SEEDS))


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_guidance_and_a_model_dtype_of_its_own(name):
    """The model input that a callback's edit goes into holds the state twice, in another dtype."""
    plan, cond = RUNS[name], torch.arange(3.0)
    x = start_of(plan)
    options: dict[str, Any] = {"cond": cond, "uncond": -cond, "guidance": 2.0, "model_dtype": torch.float32}
    got = sample(scribbling, x, plan, callback=halve, **options)

    def guided(x: Tensor, t: float) -> Tensor:
        low, high = (conditional(x.float(), torch.tensor(t), c).double() for c in (-cond, cond))
        return low + 2.0 * (high - low)

    near(got, run_plan(plan, guided, x, edit=lambda x: 0.5 * x), 1e-5)


def test_what_a_mean_shift_writes_changes_no_state():
    plan = RUNS["ddpm"]
    x = start_of(plan)
    got = sample(scribbling, x, plan, seeds=SEEDS, mean_shift=lambda x, t: scribbling(x, t))
    assert torch.equal(got, sample(network, x, plan, seeds=SEEDS, mean_shift=network))


def test_the_density_of_a_step_is_that_of_the_state_before_the_model_wrote():
    plan = RUNS["ddpm"]
    x, after = start_of(plan), start_of(plan) * 0.9
    before = x.clone()
    got = transition_logprob(scribbling, x, after, plan, 0)
    assert torch.equal(got, transition_logprob(network, before, after, plan, 0))
    assert torch.equal(x, before)


# --- predictor and corrector -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [COSINE, EDM], ids=lambda s: s.name)
@pytest.mark.parametrize("corrector", ["none", "langevin"])
def test_what_a_model_writes_in_predictor_corrector(schedule, corrector):
    x = initial(pc_plan(schedule, 5), SHAPE, SEEDS, torch.float64)
    before = x.clone()
    got = predictor_corrector(scribbling, x, schedule, 5, corrector=corrector, seeds=SEEDS)
    assert torch.equal(got, predictor_corrector(network, before, schedule, 5, corrector=corrector, seeds=SEEDS))
    assert torch.equal(x, before)


@pytest.mark.parametrize("schedule", [COSINE, EDM], ids=lambda s: s.name)
def test_what_a_callback_writes_in_predictor_corrector(schedule):
    plan = pc_plan(schedule, 5)
    x = initial(plan, SHAPE, SEEDS, torch.float64)

    def callback(info: Any) -> None:
        halve(info)
        info["x0"].fill_(math.nan)

    got = predictor_corrector(network, x, schedule, 5, corrector="ald", seeds=SEEDS, callback=callback)
    near(got, run_plan(plan, network, x, drawn(plan), edit=lambda x: 0.5 * x))


# --- rk45 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=lambda s: s.name)
def test_what_a_model_writes_in_rk45(schedule, norm):
    x = adaptive_cases.start(schedule)
    before = x.clone()

    def scribble(x: Tensor, t: Tensor) -> Tensor:
        m = adaptive_cases.network(x, t)
        x.fill_(math.nan)
        t.fill_(-1)
        return m

    got = rk45(scribble, x, schedule, norm=norm)
    assert torch.equal(got.x, rk45(adaptive_cases.network, before, schedule, norm=norm).x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=lambda s: s.name)
def test_what_a_callback_writes_in_rk45(schedule):
    """For Gaussian data around 0 the flow is linear in the state: half the state anywhere is half the state at the end.
    With the slope of the state before, the next step would start in another direction."""
    prediction = schedule.default_prediction
    network = Gaussian(0.0, 0.5)
    x = adaptive_cases.start(schedule)[:1]

    def model(x: Tensor, t: Tensor) -> Tensor:
        columns = [network.model(schedule, prediction)(row[None], float(at)) for row, at in zip(x, t, strict=True)]
        return torch.cat(columns)

    def callback(info: Any) -> None:
        if info["i"] in (1, 4):
            halve(info)

    options: dict[str, Any] = {"rtol": 1e-6, "atol": 0.0}
    whole, edited = rk45(model, x, schedule, **options), rk45(model, x, schedule, callback=callback, **options)
    near(edited.x, 0.25 * whole.x, 1e-8)
    assert (edited.steps, edited.rejected) == (whole.steps, whole.rejected)
    assert edited.model_calls == whole.model_calls + 2
