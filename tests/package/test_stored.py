"""Schedules, weightings and time samplers as JSON: equal after the way there and back, and nothing else gets in."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from diffkern import schedules
from diffkern.objectives import time_sampling, weightings
from diffkern.schedules import Schedule, makers

STORED = {
    **{name: make() for name, make in makers.SCHEDULES.items()},
    "vp of other constants": schedules.vp(0.2, 15.0),
    "edm of other constants": schedules.edm(0.01, 40, sigma_data=0.7),
    "flow with a floor": schedules.flow(1e-4),
    "zero terminal snr": schedules.zero_terminal_snr(schedules.scaled_linear(50)),
    "a table of another library": schedules.from_alphas_cumprod(torch.linspace(0.99, 0.01, 7), "theirs"),
    "a subsequence": schedules.linear(100).subsequence([0, 3, 50, 99]),
}
EDM = schedules.edm().to_dict()


@pytest.mark.parametrize("name", STORED)
def test_a_schedule_comes_back_equal(name: str) -> None:
    schedule = STORED[name]
    back = Schedule.from_json(schedule.to_json())
    assert back == schedule
    assert type(back) is type(schedule)
    assert back.name == schedule.name
    t = torch.tensor([0, 2]) if isinstance(schedule, schedules.DiscreteSchedule) else torch.tensor([0.25, 0.5])
    assert torch.equal(back.alpha(t), schedule.alpha(t))
    assert torch.equal(back.model_time("eps", t), schedule.model_time("eps", t))


@pytest.mark.parametrize("weighting", weightings.WEIGHTINGS.values(), ids=list(weightings.WEIGHTINGS))
def test_a_weighting_comes_back_equal(weighting: weightings.Weighting) -> None:
    assert weightings.Weighting.from_json(weighting.to_json()) == weighting


@pytest.mark.parametrize("name", sorted(set(time_sampling.TIME_SAMPLERS) - {"loss_second_moment"}))
def test_a_time_sampler_comes_back_equal(name: str) -> None:
    sampler = time_sampling.get_time_sampler(name)
    assert time_sampling.TimeSampler.from_json(sampler.to_json()) == sampler


def test_constants_are_kept() -> None:
    for sampler in (time_sampling.LogitNormal(-0.5, 2.0, stratified=True), time_sampling.Mode(0.3)):
        assert time_sampling.TimeSampler.from_json(sampler.to_json()) == sampler
    assert weightings.Weighting.from_json(weightings.MinSNR(7.0).to_json()) == weightings.MinSNR(7.0)


@pytest.mark.parametrize(
    ("value", "remedy"),
    [
        (schedules.path(lambda t: t, lambda t: 1 - t, name="mine"), "mine is made of functions.*pass it as schedule="),
        (schedules.log_snr_path(lambda t: 5 - 10 * t), "made of functions.*pass it as schedule="),
        (weightings.get_weighting(lambda log_snr, prediction: log_snr), "got Custom: pass it as weight="),
        (time_sampling.LossSecondMoment(10), "got LossSecondMoment: pass it as times="),
    ],
    ids=["path", "log_snr_path", "weight function", "loss_second_moment"],
)  # fmt: skip
def test_functions_are_refused_with_the_remedy(value: Any, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        value.to_json()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], r"schedule must be an object, got \[\]"),
        ({}, "schedule.kind must be one of VPSchedule"),
        ({"kind": "os.system"}, "schedule.kind must be one of VPSchedule"),
        ({"kind": ["VPSchedule"]}, "schedule.kind must be one of VPSchedule"),
        ({**EDM, "sigma_max": "80"}, "schedule.sigma_max must be a finite number, got '80'"),
        ({**EDM, "sigma_max": True}, "schedule.sigma_max must be a finite number, got True"),
        ({**EDM, "sigma_max": float("inf")}, "schedule must be JSON, got .*Infinity is no JSON number"),
        ({**EDM, "sigma": 1.0}, "schedule has the fields sigma_min, sigma_max, .*, got 'sigma'"),
        ({**EDM, "sigma_max": 0.001}, "sigma_min and sigma_max must be 0 < sigma_min < sigma_max"),
        ({"kind": "DiscreteSchedule"}, "schedule.alphas_cumprod must be given, got none"),
        ({"kind": "DiscreteSchedule", "alphas_cumprod": [0.9, "x"]}, r"schedule.alphas_cumprod\[1\] must be a finite"),
        ({"kind": "DiscreteSchedule", "alphas_cumprod": [0.9, 0.5], "kept": [1, 0]}, "kept must be 2 rising integers"),
        ({"kind": "DiscreteSchedule", "alphas_cumprod": [0.9], "betas": []}, "fields alphas_cumprod, .*, got 'betas'"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused_by_its_field(data: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Schedule.from_json(json.dumps(data))


def test_a_weighting_without_its_constant_is_refused() -> None:
    sentence = "weight.target must be given, got none"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        weightings.Weighting.from_json('{"kind": "UniformIn"}')
    with pytest.raises(ValueError, match="nested too deeply"):
        weightings.Weighting.from_json("[" * 100_000)
