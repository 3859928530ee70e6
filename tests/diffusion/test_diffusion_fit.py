"""Wrong combinations: each is refused, or warned of once, in a sentence with the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.diffusion_cases import Exact, small_unet

import diffkern
from diffkern import Diffusion, samplers, schedules
from diffkern.plan import Plan

TABLE = schedules.linear()
V = Diffusion(Exact(TABLE, "v"), TABLE, "v")
FLOW = Diffusion(Exact(schedules.flow(), "velocity"), schedules.flow())
SHAPE = (2, 3)


def refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: V.sample(SHAPE, diffkern.ddim(TABLE, 50)),
            "model's prediction 'v', got one for 'eps': make it with prediction='v'",
        ),
        (
            lambda: V.sample(SHAPE, diffkern.ddim(schedules.cosine(), 50, prediction="v")),
            "must fit the schedule linear, got .* make it on",
        ),
        (
            lambda: V.sample(SHAPE, diffkern.ddim(schedules.linear(2000), 50, prediction="v")),
            "model times of linear, got 19..",
        ),
        (lambda: V.sample(SHAPE, diffkern.euler(schedules.vp(), 5, prediction="v")), "must fit the schedule linear"),
        (lambda: FLOW.sample(SHAPE, diffkern.euler(TABLE, 5, prediction="velocity")), "model times of flow, got 999"),
        (lambda: V.sample(SHAPE, diffkern.ddim(TABLE, 5, prediction="v"), eta=0.5), "eta must be given to the sampler"),
        (lambda: V.sample(SHAPE, "DDIMM"), r"sampler must be one of .*, got 'DDIMM': did you mean 'ddim'\?"),
        (
            lambda: V.sample(SHAPE, "ddim", num_steps=5),
            r"argument 'num_steps': did you mean 'steps'\?",
        ),
        (lambda: V.sample(SHAPE, "ddim", guidance_scale=5), "'guidance_scale': did you mean 'guidance'?"),
        (lambda: V.sample(SHAPE, "ddim", prediction="eps"), "unexpected keyword argument 'prediction'"),
        (lambda: V.sample(SHAPE, 50), "sampler must be a name, a Plan or a function that makes one, got int"),
        (lambda: V.sample(SHAPE, lambda schedule, steps, prediction: None), "got one that returns NoneType"),
        (lambda: V.sample(4), "n must be a whole shape .* for a network that does not say its own, got 4"),
        (lambda: V.sample(True), "n must be a number of samples or a whole shape"),
        (
            lambda: diffkern.sample(V, torch.zeros(SHAPE), V.plan()),
            "got a Diffusion: use its methods, or give its .network",
        ),
        (lambda: diffkern.simple_loss(V, torch.zeros(SHAPE), 3, TABLE), "got a Diffusion: use its methods"),
        (lambda: V.sample(SHAPE, x=torch.zeros(3, 3)), r"x must have the shape \[2, 3\]"),
        (lambda: V.sample(SHAPE, "ddim_inversion", 4), "x must be given for ddim_inversion, which starts from data"),
        (
            lambda: V.sample(SHAPE, diffkern.ddpm(TABLE, 4, prediction="v", variance="learned")),
            "learned_variance=True",
        ),
        (lambda: V.sample(SHAPE, start=2), "x0 must be given to start in the middle"),
        (lambda: V.sample(SHAPE, cond=torch.zeros(2), guidance=2.0), "guidance needs .* uncond or Diffusion"),
        (lambda: V.loss(np.zeros(SHAPE)), "x0 must be a tensor .* got ndarray: torch.as_tensor"),
        (lambda: V.loss(torch.zeros(SHAPE, dtype=torch.uint8)), r"got torch.uint8: scale .* x0 / 127.5 - 1"),
        (lambda: V.loss(torch.zeros(SHAPE), seeds=1.5), "seeds must be an integer"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], sentence: str) -> None:
    refused(call, sentence)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Diffusion(lambda x, t: x, TABLE), "model must be a torch.nn.Module, got function"),
        (lambda: Diffusion(Exact(TABLE, "v"), "linear"), "schedule must be a diffkern Schedule, got str"),
        (lambda: Diffusion(TABLE, Exact(TABLE, "v")), "model must be a torch.nn.Module, got DiscreteSchedule"),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, "w"), "prediction must be one of eps"),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, "edm"), "prediction 'edm' needs an EDM schedule"),
        (lambda: Diffusion(Exact(TABLE, "v"), schedules.vp(), "mu"), "prediction 'mu' needs a discrete schedule"),
        (lambda: Diffusion(small_unet(time_scale=1000.0), TABLE), "meant for times in .* make it with time_scale=1"),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, time_scale=-1.0), "time_scale must be a positive number"),
        (
            lambda: Diffusion(Exact(TABLE, "v"), schedules.vp(), "v", learned_variance=True),
            "learned_variance needs a table",
        ),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, drop=0.1), "null must be .* where some are dropped"),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, drop=1.5, null=0), r"drop must lie in \[0, 1\), got 1.5"),
        (lambda: Diffusion(Exact(TABLE, "v"), TABLE, weight=torch.ones(3)), "weight must be a name"),
    ],
)
def test_what_cannot_be_put_together_is_refused(make: Callable[[], Any], sentence: str) -> None:
    refused(make, sentence)


@pytest.mark.parametrize("scale", [127.5, 0.001])
def test_data_far_from_the_noises_range_is_warned_of_once(scale: float) -> None:
    diffusion = Diffusion(Exact(TABLE, "v"), TABLE, "v")
    with pytest.warns(UserWarning, match=r"root mean square is .*: scale it \(images of 0..255 by x0 / 127.5 - 1\)"):
        diffusion.loss(torch.ones(SHAPE) * scale)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diffusion.loss(torch.ones(SHAPE) * scale)


@pytest.mark.parametrize("x0", [torch.rand(SHAPE), torch.rand(SHAPE) * 2 - 1, torch.randn(64, 64), torch.zeros(SHAPE)])
def test_usual_data_is_not_warned_of(x0: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Diffusion(Exact(TABLE, "v"), TABLE, "v").loss(x0)


GRIDLESS = {"langevin": {"steps": 3, "t": 0.5, "step_size": 1e-4}, "annealed_langevin": {"levels": 3, "each": 1}}
PLANS = [
    (schedule, prediction, name)
    for schedule, prediction in [
        (TABLE, "eps"),
        (TABLE, "v"),
        (schedules.linear(40).subsequence(range(0, 40, 2)), "x0"),
        (schedules.vp(), "score"),
        (schedules.edm(), "edm"),
        (schedules.edm(), "eps"),
        (schedules.flow(), "velocity"),
        (schedules.flow(), "x0"),
    ]
    for name in samplers.SAMPLERS
]


@pytest.mark.parametrize(
    ("schedule", "prediction", "name"), PLANS, ids=lambda value: getattr(value, "name", str(value))
)
def test_no_plan_of_the_models_own_is_taken_for_anothers(schedule: Any, prediction: str, name: str) -> None:
    """Whatever sampler can be made on the schedule fits it."""
    options: dict[str, Any] = dict(GRIDLESS.get(name, {"steps": 7}))
    if name == "langevin" and isinstance(schedule, schedules.DiscreteSchedule):
        options["t"] = 7
    try:
        plan: Plan = samplers.SAMPLERS[name](schedule, prediction=prediction, **options)
    except (ValueError, ZeroDivisionError):
        pytest.skip("no such sampler on this schedule")
    diffusion = Diffusion(Exact(schedule, prediction), schedule, prediction)
    assert diffusion.plan(plan) is plan


def test_a_plan_of_diffusers_numbers_fits() -> None:
    """float32 tables of other libraries differ in the fourth digit."""
    theirs = schedules.from_alphas_cumprod(TABLE.alphas_cumprod.float().double(), "theirs")
    assert V.plan(diffkern.ddim(theirs, 50, prediction="v")).name == "ddim"
