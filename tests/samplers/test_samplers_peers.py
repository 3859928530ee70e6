"""Plans against diffusers, step by step, where it is installed: same model, float32 tables, start and noise.

Each of its samplers is run as its users do; the plan is run by `diffkern.sample` in float32. Differences are those of
float32 arithmetic and its float32 coefficients, which a run of steps adds up. k-diffusion's formulas are transcribed
below and held in float64.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from helpers.peer_runs import model
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and its imports warn
SHAPE = (2, 3, 4, 4)
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def start(scale: float) -> Tensor:
    return scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))


def theirs(scheduler, x: Tensor, noises: list[Tensor] | None = None, monkeypatch=None) -> list[Tensor]:
    """The states after each of its steps; ``noises`` are what it draws, in turn."""
    if noises is not None:
        module = sys.modules[type(scheduler).__module__]
        draws = iter(noises)
        monkeypatch.setattr(module, "randn_tensor", lambda *_a, **_k: next(draws))
    states = []
    for t in scheduler.timesteps:
        m = model(scheduler.scale_model_input(x, t), t) if hasattr(scheduler, "scale_model_input") else model(x, t)
        x = scheduler.step(m, t, x, return_dict=False)[0]
        states.append(x)
    return states


def ours(plan: Plan, x: Tensor, noises: list[Tensor] | None = None) -> list[Tensor]:
    """The states after each row."""
    states: list[Tensor] = []
    used = None if noises is None else noises[: sum(row.draws for row in plan.rows)]
    rows = tuple(row if row.ends_step else replace(row, ends_step=True) for row in plan.rows)
    every = Plan(plan.name, rows, plan.init_scale, plan.first_k, plan.prediction, plan.time_dtype)
    sample(model, x, every, noise=used, callback=lambda info: states.append(info["x"].clone()))
    return states


def compare(got: list[Tensor], want: list[Tensor], tol: float = 1e-6) -> None:
    """``tol`` a step, of the largest value."""
    assert len(got) == len(want)
    for i, (one, two) in enumerate(zip(got, want, strict=True)):
        scale = float(two.abs().max())
        torch.testing.assert_close(one, two, rtol=0, atol=tol * (i + 1) * scale, msg=lambda m, i=i: f"step {i}: {m}")


def table_of(scheduler) -> schedules.DiscreteSchedule:
    return schedules.from_alphas_cumprod(scheduler.alphas_cumprod)


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_euler_ancestral(diffusers, monkeypatch, steps, prediction):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**TABLE, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    name = {"epsilon": "eps", "v_prediction": "v"}[prediction]
    plan = samplers.euler_ancestral(table_of(scheduler), steps, prediction=name)
    noises = [start(1.0) * (0.5 + 0.1 * i) for i in range(steps)]
    x = start(float(scheduler.init_noise_sigma))
    compare(ours(plan, x, noises), theirs(scheduler, x, noises, monkeypatch))


@pytest.mark.parametrize("steps", [6, 20])
def test_heun(diffusers, steps):
    scheduler = diffusers.HeunDiscreteScheduler(**TABLE)
    scheduler.set_timesteps(steps)
    x = start(float(scheduler.init_noise_sigma))
    # Their second slope is of time t', as is ours.
    got, want = ours(samplers.heun(table_of(scheduler), steps), x), theirs(scheduler, x)
    compare(got, want)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpm_solver_multistep(diffusers, order, final, solver):
    steps = 9
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, solver_order=order, solver_type=solver, lower_order_final=final
    )
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    make = [samplers.dpmpp_1s, samplers.dpmpp_2m, samplers.dpmpp_3m][order - 1]
    options = {} if order == 1 else {"solver": solver, "lower_order_final": final}
    options |= {"compat": True} if order == 3 else {}
    plan = make(table_of(scheduler), timesteps=times, **options)
    assert [row.time for row in plan.rows] == times
    x = start(1.0)
    compare(ours(plan, x), theirs(scheduler, x))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpm_solver_sde(diffusers, monkeypatch, order, solver):
    steps = 8
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **TABLE, solver_order=order, solver_type=solver, algorithm_type="sde-dpmsolver++"
    )
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    if order == 1:
        plan = samplers.dpmpp_1s(table_of(scheduler), timesteps=times, eta=1.0)
    else:
        plan = samplers.dpmpp_2m_sde(table_of(scheduler), timesteps=times, solver=solver)
    noises = [start(1.0) * (0.5 + 0.1 * i) for i in range(steps)]
    x = start(1.0)
    compare(ours(plan, x, noises), theirs(scheduler, x, noises, monkeypatch))


@pytest.mark.parametrize("karras", [False, True])
def test_dpm_solver_on_its_levels(diffusers, karras):
    """Levels given as they are; for Karras' it gives the model times rounded to the table's, so only those are held."""
    scheduler = diffusers.DPMSolverMultistepScheduler(**TABLE, use_karras_sigmas=karras)
    scheduler.set_timesteps(8)
    plan = samplers.dpmpp_2m(table_of(scheduler), sigmas=scheduler.sigmas.double(), lower_order_final=True)
    if karras:
        assert [round(row.time) for row in plan.rows] == scheduler.timesteps.tolist()
    else:
        x = start(1.0)
        compare(ours(plan, x), theirs(scheduler, x))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(diffusers, order, variant):
    """Its bh1 gives NaN in a step to sigma = 0 (0 times infinity), so that one ends at its lowest level."""
    end = {"bh1": "sigma_min", "bh2": "zero"}[variant]
    scheduler = diffusers.UniPCMultistepScheduler(
        **TABLE, solver_order=order, solver_type=variant, final_sigmas_type=end
    )
    scheduler.set_timesteps(9)
    grid = scheduler.sigmas.double()
    plan = samplers.unipc(table_of(scheduler), sigmas=grid, order=order, variant=variant)
    x = start(1.0)
    compare(ours(plan, x), theirs(scheduler, x))


@pytest.mark.parametrize("order", [1, 2, 4])
def test_lms(diffusers, order):
    pytest.importorskip("scipy")
    steps = 8
    scheduler = diffusers.LMSDiscreteScheduler(**TABLE)
    scheduler.set_timesteps(steps)
    plan = samplers.lms(table_of(scheduler), steps, order=order)
    x = start(float(scheduler.init_noise_sigma))
    want, y = [], x
    for t in scheduler.timesteps:
        y = scheduler.step(model(scheduler.scale_model_input(y, t), t), t, y, order=order, return_dict=False)[0]
        want.append(y)
    compare(ours(plan, x), want)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(diffusers, order):
    steps = 8
    scheduler = diffusers.DEISMultistepScheduler(**TABLE, solver_order=order, lower_order_final=False)
    scheduler.set_timesteps(steps)
    plan = samplers.deis(table_of(scheduler), sigmas=scheduler.sigmas.double(), order=order)
    x = start(1.0)
    first = float(table_of(scheduler).alpha(int(scheduler.timesteps[0])))
    got = ours(plan, x / first)  # ours is the state x0 + sigma eps
    levels = [row.known_n for row in plan.rows]
    scaled = [state / math.sqrt(1.0 + level**2) for state, level in zip(got, levels, strict=True)]
    compare(scaled, theirs(scheduler, x))


@pytest.mark.parametrize("steps", [10])
def test_ddim_inversion(diffusers, steps):
    scheduler = diffusers.DDIMInverseScheduler(**TABLE, clip_sample=False)
    scheduler.set_timesteps(steps)
    plan = samplers.ddim_inversion(table_of(scheduler), steps, prediction="eps")
    assert [row.time for row in plan.rows] == scheduler.timesteps.tolist()
    x = start(1.0)
    compare(ours(plan, x), theirs(scheduler, x))


def test_flow_heun(diffusers):
    """Their velocity is noise - data and their time 1000 sigma, sigma = 1 - t."""
    steps = 6
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    times = 1.0 - torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]])
    plan = samplers.heun(schedules.flow(), timesteps=times)
    x, y, want = start(1.0), start(1.0), []
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(-model(y, 1.0 - scheduler.sigmas[i]), t, y, return_dict=False)[0]
        want.append(y)
    compare(ours(plan, x), want)
