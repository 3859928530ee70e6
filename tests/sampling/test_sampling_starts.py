"""`sample(start=)` with one start a sample: who starts later waits, and nobody notices the others."""

from __future__ import annotations

import pytest
import torch
from helpers.sampling_cases import PLANS, SEEDS, SHAPE, network
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import initial, sample

START = torch.tensor([4, 0, 7])


def begin(plan: Plan, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each sample at the level of its own start."""
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    x = initial(plan, SHAPE, SEEDS, dtype, start=START, x0=x0)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(x[one], initial(plan, (1, *SHAPE[1:]), SEEDS[one], dtype, start=int(START[b]), x0=x0[one]))
    return x


@pytest.mark.parametrize("name", ["ddpm", "ddim", "euler", "heun", "euler_edm", "euler_flow", "heun_flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sample_is_as_if_alone(name, dtype):
    plan, x = PLANS[name], begin(PLANS[name], dtype)
    got = sample(network, x, plan, seeds=SEEDS, start=START)
    for b in range(3):
        alone = sample(network, x[b : b + 1], plan, seeds=SEEDS[b : b + 1], start=int(START[b]))
        assert torch.equal(got[b : b + 1], alone)


def test_equal_starts_are_one_start():
    plan = PLANS["ddpm"]
    x = begin(plan)
    got = sample(network, x, plan, seeds=SEEDS, start=torch.tensor([5, 5, 5]))
    assert torch.equal(got, sample(network, x, plan, seeds=SEEDS, start=5))


def test_with_a_mask_guidance_and_a_trajectory():
    plan = PLANS["ddpm"]
    x, known = begin(plan), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(known.numel()).reshape(SHAPE) % 3 > 0).to(torch.uint8)
    cond, uncond = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return network(x, t) + 0.1 * c.reshape(-1, 1, 1, 1)

    more = {"guidance": 2.5}
    got = sample(
        model, x, plan, seeds=SEEDS, start=START, mask=mask, known=known, cond=cond, uncond=uncond, trajectory=True,
        **more,
    )  # fmt: skip
    assert got.trajectory.shape[0] == len(plan.steps) + 1
    for b, one in enumerate(slice(b, b + 1) for b in range(3)):
        alone = sample(
            model, x[one], plan, seeds=SEEDS[one], start=int(START[b]), mask=mask[one], known=known[one],
            cond=cond[one], uncond=uncond[one], trajectory=True, **more,
        )  # fmt: skip
        assert torch.equal(got.x[one], alone.x)
        assert torch.equal(got.trajectory[int(START[b]) + 1 :, one], alone.trajectory[1:])


@pytest.mark.parametrize("make", ["soft", "hard"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "heun"])
def test_a_mask_does_not_touch_who_waits(name, make):
    """With a network that looks around, so that what a waiting sample hides would show."""
    plan = PLANS[name]
    x, known = begin(plan), torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    part = torch.rand(SHAPE, generator=torch.Generator().manual_seed(3))
    mask = part if make == "soft" else (part > 0.5)

    def look(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t) + 0.3 * x.flip(-1)

    got = sample(look, x, plan, seeds=SEEDS, mask=mask, known=known, start=START)
    for b in range(3):
        one = slice(b, b + 1)
        alone = sample(look, x[one], plan, seeds=SEEDS[one], mask=mask[one], known=known[one], start=int(START[b]))
        assert torch.equal(got[one], alone)


def test_waiting_samples_keep_their_state():
    plan = PLANS["heun"]
    x = begin(plan)
    states = sample(network, x, plan, start=START, trajectory=True).trajectory
    for b in range(3):
        for i in range(int(START[b]) + 1):
            assert torch.equal(states[i, b], x[b])
    first = torch.tensor([4, 3, 7])
    assert sample(network, x, plan, start=first, trajectory=True).trajectory.shape[0] == len(plan.steps) - 3 + 1


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.tensor([1, 2]), r"start must be an integer or int64 \[3\], got torch\.int64 of shape \[2\]"),
        (torch.tensor([1.0, 2.0, 3.0]), r"start must be an integer or int64 \[3\], got torch\.float32"),
        (torch.tensor([0, 1, 10]), r"start must lie in 0\.\.9 \(ddim has 10 steps\), got 10"),
        (torch.tensor([0, -1, 1]), r"start must lie in 0\.\.9 \(ddim has 10 steps\), got -1"),
    ],
)
def test_bad_starts_say_what_is_wrong(start, message):
    with pytest.raises(ValueError, match=message):
        sample(network, torch.zeros(SHAPE), PLANS["ddim"], start=start)


def test_a_multistep_plan_says_how_to_start_later():
    plan = samplers.dpmpp_2m(schedules.linear(), 10)
    with pytest.raises(
        ValueError, match=r"reads no history of the steps before it, got 4 of dpmpp_2m: make the plan on"
    ):
        sample(network, torch.zeros(SHAPE), plan, start=torch.tensor([0, 4, 0]))
    times = [row.time for row in plan.rows]
    rest = samplers.dpmpp_2m(schedules.linear(), timesteps=times[4:])
    x = initial(plan, SHAPE, SEEDS, start=4, x0=torch.zeros(SHAPE))
    assert torch.isfinite(sample(network, x, rest)).all()
