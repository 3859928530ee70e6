"""Schedules on a device, where no value is looked at: NaN instead of errors; and the errors of the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.path_cases import PATHS, close, cubic
from torch import Tensor

from diffkern import schedules
from diffkern.schedules import base as _schedule
from diffkern.schedules import continuous as _continuous
from diffkern.schedules import discrete as _discrete
from diffkern.schedules import exploding as _exploding
from diffkern.schedules import paths as _paths
from diffkern.schedules.base import Schedule


def on_a_device(t: Tensor, log_snr: Tensor) -> dict[str, Tensor]:
    """Every function of the interface, of every schedule that does not call a user's function."""
    out = {}
    made = {name: s for name, s in PATHS.items() if "path" not in name} | {
        "table": schedules.linear(),
        "kept": schedules.linear().subsequence([1, 5, 900]),
        "path": PATHS["path cubic"],
    }
    for name, s in made.items():
        for method in ("alpha", "sigma", "alpha_dot", "sigma_dot", "log_snr", "drift", "diffusion", "sigma_ve"):
            out[f"{name} {method}"] = getattr(s, method)(t)
        out[f"{name} model_time"] = s.model_time("eps", t)
        out[f"{name} time_of_log_snr"] = s.time_of_log_snr(log_snr)
        out[f"{name} bisection"] = Schedule.time_of_log_snr(s, log_snr)
    return out


@pytest.mark.full
def test_nothing_is_looked_at_on_a_device():
    """The same code path, run on the meta device, which has no values: any look at one would raise."""
    for name, value in on_a_device(torch.full((2,), 5.0, device="meta"), torch.zeros(2, device="meta")).items():
        assert value.shape == (2,), name
        assert value.device.type == "meta", name


@pytest.mark.gpu
def test_a_device_gives_the_same_values_and_nan_outside():
    t, log_snr = torch.tensor([0.25, 0.75], dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    want = on_a_device(t, log_snr)
    for name, value in on_a_device(t.cuda(), log_snr.cuda()).items():
        close(value.cpu(), want[name], rtol=1e-12, atol=1e-13)
    is_nan_outside(on_a_device(torch.full((2,), -7.0, device="cuda"), torch.full((2,), math.nan, device="cuda")))


def is_nan_outside(values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if name.split()[-1] in ("sigma", "log_snr", "sigma_ve", "diffusion", "time_of_log_snr", "bisection"):
            assert value.isnan().all(), name


def test_nan_outside_where_nothing_is_looked_at(monkeypatch):
    """The values of a device, on the CPU with the looks taken out."""
    without_looks = {
        "check_times": lambda ok, t, rule: ok,
        "as_log_snr": lambda value: torch.as_tensor(value, dtype=torch.float64),
        "check_log_snrs": lambda value, low, high: (value >= low) & (value <= high),
    }
    for module in (_schedule, _continuous, _discrete, _exploding):
        for name in without_looks.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, without_looks[name])
    monkeypatch.setattr(_paths, "_check", lambda name, value, t, ok, rule: value)
    is_nan_outside(on_a_device(torch.tensor([-7.0, -7.0]), torch.tensor([math.nan, math.nan])))


def nan_outside(t: Tensor) -> Tensor:
    return torch.where(t > 0.5, t, torch.nan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.vp().alpha(1.5), r"t must lie in \[0, 1\] \(0 is data, 1 is noise\), got 1\.5"),
        (lambda: schedules.ve().sigma(-0.1), r"t must lie in \[0, 1\] \(0 is data, 1 is noise\), got -0\.1"),
        (lambda: schedules.sub_vp().drift(math.nan), r"t must lie in \[0, 1\] \(0 is data, 1 is noise\), got nan"),
        (lambda: PATHS["path cubic"].alpha(2.0), r"t must lie in \[0, 1\] \(0 is noise, 1 is data\), got 2\.0"),
        (lambda: schedules.vp(0.0), r"must be 0 < beta_min <= beta_max, got 0\.0 and 20\.0"),
        (lambda: schedules.sub_vp(3, 2), r"must be 0 < beta_min <= beta_max, got 3 and 2"),
        (lambda: schedules.ve(1, 1), r"must be 0 < sigma_min < sigma_max, got 1 and 1"),
        (lambda: schedules.ve_exponential(1.0), r"base must be a finite number > 1, got 1\.0"),
        (lambda: schedules.cosine_vp(-1.0), r"s must be a finite number >= 0, got -1\.0"),
        (lambda: schedules.laplace_vp(b=0.0), r"b must be positive, got 0\.0"),
        (lambda: schedules.laplace_vp(mu=math.inf), r"mu must be finite, got inf"),
        (lambda: schedules.laplace_vp(eps=1.0), r"eps must lie in \(0, 1\), got 1\.0"),
        (lambda: schedules.linear_log_snr(1.0, 2.0), r"lowest < highest, got 2\.0, 1\.0"),
        (
            lambda: schedules.path(lambda t: t - 0.5, lambda t: 1 - t),
            r"alpha must be finite and >= 0 for every t in \[0, 1\], got alpha\(0\) = -0\.5",
        ),
        (
            lambda: schedules.path(lambda t: t, lambda t: 0.5 - t),
            r"beta must be finite and >= 0 for every t in \[0, 1\], got beta\(0\.500977\) = -0\.000976562",
        ),
        (
            lambda: schedules.path(lambda t: t, lambda t: 1 / t),
            r"beta must be finite and >= 0 for every t in \[0, 1\], got beta\(0\) = inf",
        ),
        (
            lambda: schedules.path(nan_outside, lambda t: 1 - t),
            r"alpha must be finite and >= 0 .*, got alpha\(0\) = nan",
        ),
        (lambda: schedules.path(lambda t: t, lambda t: t * 0), r"must not both be 0, got both at t = 0"),
        (lambda: schedules.path(lambda t: t, lambda t: t + 0), r"alpha and beta must not both be 0, got both at t = 0"),
        (lambda: schedules.path(lambda t: 1.0, lambda t: 2.0), r"one end of the path must have more signal"),
        (lambda: schedules.path(3.0, lambda t: t), r"alpha must be a function of t, got 3\.0"),
        (
            lambda: schedules.path(lambda t: torch.ones(3), lambda t: t),
            r"alpha must give one value a time, shape \[1025\], got \[3\]",
        ),
        (lambda: schedules.path(cubic, lambda t: 1 - t, time_eps=1.0), r"time_eps must lie in \[0, 1\), got 1\.0"),
        (
            lambda: PATHS["path vp"].diffusion(1.0),
            r"diffusion_squared must be a number for every t in \[0, 1\], got diffusion_squared\(1\) = nan",
        ),
        (lambda: schedules.log_snr_path(lambda t: t), r"log_snr must fall from t = 0 \(data\) to t = 1 \(noise\), got"),
        (lambda: schedules.log_snr_path(lambda t: -t.log()), r"log_snr must be finite .*, got log_snr\(0\) = inf"),
        (lambda: schedules.log_snr_path(3), r"log_snr must be a function of t, got 3"),
        (
            lambda: schedules.ve().time_of_log_snr(20.0),
            r"log_snr must lie in the schedule's range \[-7\.82405, 9\.21034\], got 20",
        ),
        (lambda: schedules.vp().time_of_log_snr(-11.0), r"log_snr must lie in the schedule's range \[-10\.05.*got -11"),
        (lambda: PATHS["path given slopes"].time_of_log_snr(math.nan), r"log_snr must be a number, got nan"),
        (lambda: schedules.flow(0.1).time_of_log_snr(math.inf), r"range \[-inf, 4\.60517\], got inf"),
        (lambda: schedules.edm().time_of_sigma(-1.0), r"sigma must be a noise level >= 0, got -1\.0"),
        (lambda: schedules.vp().prior_log_density(torch.tensor(1.0)), r"x must have a batch dimension, got shape \[\]"),
        (lambda: schedules.discretise(schedules.linear()), r"discretise needs a continuous schedule .*, got linear"),
        (lambda: schedules.vp().coefficients("mu", 0.5), r"prediction 'mu' needs a discrete schedule, got vp"),
    ],
)
def test_bad_input_says_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
