"""Samples of 16 bits: the states inside are float32, so that no update is lost, and all that is seen has 16 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.sampling_cases import COSINE, EDM, LINEAR, PLANS, SEEDS, SHAPE, network, start_of
from helpers.sampling_plans import ODD, conditional
from torch import Tensor

from diffkern import samplers
from diffkern.plan import Plan
from diffkern.sampling import initial, pc_plan, predictor_corrector, sample

SIXTEEN = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
RUNS = {**PLANS, "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 8), "unipc": samplers.unipc(COSINE, 8), "odd": ODD}


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The best eps for Gaussian data of deviation 0.5, on `linear`."""
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (LINEAR.alpha(t), LINEAR.sigma(t)))
    return (sigma / (0.25 * alpha**2 + sigma**2) * x.double()).to(x.dtype)


def ddim_of_gaussian(plan: Plan, x: Tensor) -> Tensor:
    """DDIM's state at the end: every step is linear in the state."""
    scale = 1.0
    times = [int(row.time) for row in plan.rows]
    for t, to in zip(times, [*times[1:], None], strict=True):
        alpha, sigma = float(LINEAR.alpha(t)), float(LINEAR.sigma(t))
        alpha_to, sigma_to = (1.0, 0.0) if to is None else (float(LINEAR.alpha(to)), float(LINEAR.sigma(to)))
        eps = sigma / (0.25 * alpha**2 + sigma**2)
        scale *= alpha_to * (1.0 - sigma * eps) / alpha + sigma_to * eps
    return scale * x.double()


@pytest.mark.parametrize("steps", [10, 100, 1000])
@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_many_small_steps_add_up(dtype, steps):
    """With states of 16 bits, 1000 steps return the noise: almost every update is below half a unit."""
    plan = samplers.ddim(LINEAR, steps)
    x = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    want = ddim_of_gaussian(plan, x)
    error = float((sample(gaussian, x, plan).double() - want).norm() / want.norm())
    assert error < 2.0 * UNIT[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_the_result_is_that_of_float32_states_rounded_once(name, dtype):
    plan = RUNS[name]
    x = start_of(plan, dtype)
    got = sample(network, x, plan, seeds=SEEDS)
    want = sample(network, x.float(), plan, seeds=SEEDS, model_dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want.to(dtype))
    assert torch.equal(sample(network, x, plan, seeds=SEEDS, out_dtype=torch.float32), want)


@pytest.mark.parametrize("schedule", [COSINE, EDM], ids=lambda s: s.name)
def test_predictor_corrector(schedule):
    x = initial(pc_plan(schedule, 5), SHAPE, SEEDS, torch.bfloat16)
    known = torch.zeros_like(x)
    mask = torch.full_like(x, 0.5)
    got = predictor_corrector(network, x, schedule, 5, seeds=SEEDS, mask=mask, known=known)
    want = predictor_corrector(
        network, x.float(), schedule, 5, seeds=SEEDS, mask=mask.float(), known=known.float(), model_dtype=x.dtype
    )
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("name", ["ddpm", "euler", "dpmpp_2m"])
def test_what_is_given_and_seen_has_the_dtype_of_x(name):
    plan = RUNS[name]
    x = start_of(plan, torch.bfloat16)
    cond, dtypes = torch.zeros(3), set()
    noise = [torch.randn_like(x) for row in plan.rows if row.draws]
    mask, known = torch.full_like(x, 0.5), torch.ones_like(x)

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        dtypes.add(x.dtype)
        return conditional(x, t, cond)

    def callback(info: Any) -> None:
        dtypes.update((info["x"].dtype, info["x0"].dtype))

    options: dict[str, Any] = {"cond": cond, "callback": callback, "mask": mask, "known": known}
    final, states, _ = sample(model, x, plan, noise=noise or None, seeds=SEEDS, trajectory=True, **options)
    assert dtypes == {final.dtype, states.dtype} == {torch.bfloat16}
    assert torch.equal(states[-1], final)


@pytest.mark.parametrize("loop", ["sample", "predictor_corrector"])
def test_an_edit_counts_where_it_was_made_and_the_rest_keeps_its_bits(loop):
    plan = pc_plan(COSINE, 20)
    x = initial(plan, SHAPE, SEEDS, torch.bfloat16)

    def run(callback: Any) -> Tensor:
        if loop == "sample":
            return sample(network, x, plan, seeds=SEEDS, callback=callback, out_dtype=torch.float32)
        options: dict[str, Any] = {"seeds": SEEDS, "callback": callback, "out_dtype": torch.float32}
        return predictor_corrector(network, x, COSINE, 20, corrector="ald", **options)

    def paint(info: Any) -> None:
        info["x"][:, 0] = 0.25

    plain, painted = run(lambda info: None), run(paint)
    assert torch.equal(painted[:, 1:], plain[:, 1:])
    assert bool((painted[:, 0].bfloat16() == 0.25).all())
    assert torch.equal(plain, run(lambda info: info["x"].mul_(1.0)))  # written to, and as it was
    assert bool(run(lambda info: info["x"].fill_(math.nan)).isnan().all())


def test_large_values_of_float16_survive_where_the_model_input_is_scaled():
    """The state of EDM's first steps is beyond 65504 only inside: the model sees c_in x."""
    plan = samplers.euler(EDM, 4)
    x = torch.full((1, 1, 2, 2), 6e4, dtype=torch.float16)
    got = sample(lambda x, t: -x, x, plan, out_dtype=torch.float32)
    assert bool(got.isfinite().all())
    assert torch.equal(got, sample(lambda x, t: -x, x.float(), plan, model_dtype=torch.float16))
