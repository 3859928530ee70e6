"""`sample(logprob=True)` and `transition_logprob`: the density of every step, against torch.distributions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.sampling_cases import PLANS, SEEDS, SHAPE, network, start_of
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import initial, sample, transition_logprob

STOCHASTIC = {
    "ddpm": PLANS["ddpm"],
    "ddpm_clip": PLANS["ddpm_clip"],
    "ddim_eta_clip": PLANS["ddim_eta_clip"],
    "euler_ancestral": samplers.euler_ancestral(schedules.linear(), 8),
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde(schedules.linear(), 8),
    "euler_maruyama": samplers.euler_maruyama(schedules.vp(), 8),
    "churned heun": samplers.heun(schedules.edm(), 6, churn=3.0),
}


def by_distributions(plan: Plan, states: Tensor) -> Tensor:
    """Each step's density from its mean, which is the step without its noise, [steps, B]."""
    quiet = replace(plan, rows=tuple(replace(row, g=0.0) for row in plan.rows))
    found = torch.zeros(len(plan.steps), len(states[0]), dtype=torch.float64)
    for i, step in enumerate(plan.steps):
        rows = plan.rows[step.start : step.stop]
        assert len(rows) == 1
        assert not rows[0].reads
        one = replace(quiet, rows=(quiet.rows[step.start],), first_k=1.0 if i == 0 else plan.rows[step.start - 1].k)
        if i == 0:
            one = replace(one, first_k=plan.first_k)
        mean = sample(network, states[i], one)
        if rows[0].g != 0:
            density = torch.distributions.Normal(mean, abs(rows[0].g)).log_prob(states[i + 1])
            found[i] = density.flatten(1).sum(1)
    return found


@pytest.mark.parametrize("name", ["ddpm", "ddpm_clip", "ddim_eta_clip", "euler_ancestral", "euler_maruyama"])
def test_against_distributions(name):
    plan = STOCHASTIC[name]
    x = start_of(plan)
    got = sample(network, x, plan, seeds=SEEDS, trajectory=True, logprob=True)
    assert got.logprob.dtype == torch.float64
    torch.testing.assert_close(got.logprob, by_distributions(plan, got.trajectory), rtol=1e-9, atol=1e-7)
    assert torch.equal(got.x, sample(network, x, plan, seeds=SEEDS))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_from_the_noise_itself(name):
    """(x' - mean)/g is the noise, so a step's density is that of its draws, whatever the histories."""
    plan = STOCHASTIC[name]
    got = sample(network, start_of(plan), plan, seeds=SEEDS, logprob=True).logprob
    for i, step in enumerate(plan.steps):
        want = torch.zeros(3, dtype=torch.float64)
        for number in step:
            row = plan.rows[number]
            if row.draws:
                z = ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64).flatten(1)
                want -= 0.5 * (z * z).sum(1) + z.shape[1] * (math.log(abs(row.g)) + 0.5 * math.log(2 * math.pi))
        torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_given_next_state(dtype):
    """The same bits as while sampling, so the ratio of two equal policies is exactly 1."""
    plan = PLANS["ddpm"]
    got = sample(network, start_of(plan, dtype), plan, seeds=SEEDS, trajectory=True, logprob=True)
    assert got.logprob.dtype == torch.float32
    for i in range(len(plan.steps)):
        again = transition_logprob(network, got.trajectory[i], got.trajectory[i + 1], plan, i)
        assert torch.equal(again, got.logprob[i])
    assert torch.equal(got.logprob[-1], torch.zeros(3))  # no noise in the last step


def test_guidance_and_starts():
    plan, cond, uncond = PLANS["ddpm"].with_guidance(3.0), torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return network(x, t) + 0.1 * c.reshape(-1, 1, 1, 1)

    conditions = {"cond": cond, "uncond": uncond}
    start = torch.tensor([3, 0, 5])
    x = initial(plan, SHAPE, SEEDS, start=start, x0=torch.zeros(SHAPE))
    got = sample(model, x, plan, seeds=SEEDS, trajectory=True, logprob=True, start=start, **conditions)
    for b, first in enumerate(start.tolist()):
        assert torch.equal(got.logprob[:first, b], torch.zeros(first))  # waiting is certain
        for i in range(first, len(plan.steps)):
            one = {name: value[b : b + 1] for name, value in conditions.items()}
            before, after = got.trajectory[i, b : b + 1], got.trajectory[i + 1, b : b + 1]
            assert torch.equal(transition_logprob(model, before, after, plan, i, **one)[0], got.logprob[i, b])


def test_gradients_reach_the_model():
    plan = PLANS["ddpm"]
    weight = torch.nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return weight * torch.tanh(x) + 0.1

    x = start_of(plan)
    states = sample(model, x, plan, seeds=SEEDS, trajectory=True).trajectory
    for i in (0, 5):
        row = plan.rows[i]
        (ours,) = torch.autograd.grad(transition_logprob(model, states[i], states[i + 1], plan, i).sum(), weight)
        mean = (
            row.a * states[i]
            + row.b * (row.p * states[i] + row.q * model(states[i], states))
            + row.d * model(states[i], states)
        )
        want = torch.distributions.Normal(mean, row.g).log_prob(states[i + 1]).sum()
        torch.testing.assert_close(ours, torch.autograd.grad(want, weight)[0])


def test_deterministic_steps_have_none():
    got = sample(network, start_of(PLANS["ddim"]), PLANS["ddim"], logprob=True)
    assert got.trajectory is None
    assert torch.equal(got.logprob, torch.zeros(10, 3, dtype=torch.float64))


def test_bad_input_says_what_is_wrong():
    ddpm, x = PLANS["ddpm"], torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"logprob has no meaning for a state whose known part is put in, got a mask"):
        sample(network, x, ddpm, seeds=SEEDS, logprob=True, mask=x, known=x)
    noisy = replace(ddpm, rows=(replace(ddpm.rows[0], r=0.5), *ddpm.rows[1:]))
    with pytest.raises(ValueError, match=r"logprob needs rows whose noise is added to the state alone, got r = 0"):
        sample(network, x, noisy, seeds=SEEDS, logprob=True)
    with pytest.raises(ValueError, match=r"step must be an integer in 0\.\.11 \(ddpm has 12\), got 12"):
        transition_logprob(network, x, x, ddpm, 12)
    with pytest.raises(ValueError, match=r"step must be one row that reads no history, .* got step 0 of heun"):
        transition_logprob(network, x, x, PLANS["heun"], 0)
    twice = replace(ddpm, rows=(*(replace(row, path=(0.1, 0.4)) for row in ddpm.rows[:2]), *ddpm.rows[2:]))
    with pytest.raises(ValueError, match=r"logprob needs independent noise in each row, got a path used twice"):
        sample(network, x, twice, seeds=SEEDS, logprob=True)
