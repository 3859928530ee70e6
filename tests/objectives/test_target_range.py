"""Targets and weights without a value, or beyond what a dtype holds: one rule for every prediction, end and dtype.

The loss is a number and so is its gradient, or one sentence names what is too large and the remedy.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern.checks import check_level, most_in
from diffkern.objectives.weightings import WEIGHTINGS
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.makers import SCHEDULES

TARGET = "(must have a target|is -eps/sigma)"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MADE: dict[str, Schedule] = {name: make() for name, make in SCHEDULES.items()}
MADE["zero_snr"] = diffkern.zero_terminal_snr(diffkern.scaled_linear())
MADE["cosine_vp s"] = diffkern.cosine_vp(0.008)
MADE["root"] = diffkern.path(lambda t: t, lambda t: (1.0 - t).sqrt())

# Prediction -> the schedules whose target has no number at the data end: 1/sigma with sigma = 0, d sigma/dt of a sigma
# that starts like a root, and EDM's 1/c_out.
NO_NUMBER = {
    "score": {"vp", "sub_vp", "cosine_vp", "cosine_vp s", "ve_exponential", "flow", "edm", "root"},
    "velocity": {"vp", "cosine_vp s", "ve_exponential", "root"},
    "edm": {"edm"},
}


def ends(schedule: Schedule) -> dict[str, Tensor]:
    """The first and last time that a model is called at."""
    if isinstance(schedule, DiscreteSchedule):
        return {"data": torch.tensor([0]), "noise": torch.tensor([schedule.T - 1])}
    return {"data": torch.tensor([schedule.data_end]), "noise": torch.tensor([schedule.noise_end])}


def predictions(schedule: Schedule) -> list[str]:
    more = ["mu"] if isinstance(schedule, DiscreteSchedule) else ["edm"] if schedule.name == "edm" else []
    return ["eps", "x0", "v", "score", "velocity", *more]


def loss(schedule: Schedule, t: Tensor, prediction: str, dtype: torch.dtype, weight: Any = None) -> tuple[Tensor, Any]:
    x0 = torch.linspace(-1, 1, 8, dtype=dtype).reshape(1, 2, 2, 2)
    pred = torch.zeros_like(x0).requires_grad_()
    value = diffkern.prediction_loss(pred, x0, t, schedule, prediction, weight=weight, seeds=diffkern.seeds(0, 1))
    value.backward()
    return value, pred.grad


@pytest.mark.parametrize("dtype", few([str(dtype)[6:] for dtype in DTYPES], "float32"))
@pytest.mark.parametrize("name", MADE)
def test_a_loss_has_a_number_or_says_why_not(name: str, dtype: str) -> None:
    schedule = MADE[name]
    for (end, t), prediction in itertools.product(ends(schedule).items(), predictions(schedule)):
        # log_snr_dot is 1e6 at both ends, sigma (alpha at the other) 0.0316: a rate of 1.6e4.
        steep = (name, prediction, dtype) == ("laplace_vp", "velocity", "float16")
        if steep or (end == "data" and name in NO_NUMBER.get(prediction, ())):
            with pytest.raises(ValueError, match=rf"prediction '{prediction}' {TARGET}"):
                loss(schedule, t, prediction, getattr(torch, dtype))
            continue
        value, grad = loss(schedule, t, prediction, getattr(torch, dtype))
        assert bool(torch.isfinite(value)), (end, prediction)
        assert bool(torch.isfinite(grad).all()), (end, prediction)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [str(dtype)[6:] for dtype in DTYPES])
@pytest.mark.parametrize("name", MADE)
def test_every_weighting_has_a_number_or_says_why_not(name: str, dtype: str) -> None:
    schedule = MADE[name]
    for t, prediction, weight in itertools.product(ends(schedule).values(), predictions(schedule), WEIGHTINGS):
        said = ""
        try:
            value, grad = loss(schedule, t, prediction, getattr(torch, dtype), weight)
        except ValueError as error:
            said = str(error)
        if said:
            assert re.search(rf"finite weight|{TARGET}|must be a number", said)
            continue
        assert bool(torch.isfinite(value)), (prediction, weight)
        # A gradient of few elements and a large weight may pass 65504, as in plain torch: loss scaling sees it.
        assert dtype == "float16" or bool(torch.isfinite(grad).all()), (prediction, weight)


def test_the_sentence_names_coefficients_time_and_remedy() -> None:
    with pytest.raises(
        ValueError,
        match=r"prediction 'velocity' must have a target u x0 \+ v eps with u and v of at most 2.306e\+18 in float32, "
        r"got u = -0.05 and v = inf at t = 0.0 of vp: train inside time_range, 0.001 to 1$",
    ):
        loss(MADE["vp"], torch.zeros(1), "velocity", torch.float32)


def test_float16_has_room_for_eight_standard_deviations() -> None:
    """|v| = 1/sigma of the score: 65504/8 = 8188, so sigma = 1/8000 is trained and 1/9000 is not; bfloat16 takes it."""
    schedule = diffkern.edm()
    value, grad = loss(schedule, torch.tensor([1 / 8000.0]), "score", torch.float16)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(grad).all())
    with pytest.raises(
        ValueError, match=r"at most 8188 in float16, got u = 0 and v = -9000 .*or in bfloat16 or float32"
    ):
        loss(schedule, torch.tensor([1 / 9000.0], dtype=torch.float64), "score", torch.float16)
    loss(schedule, torch.tensor([1 / 9000.0]), "score", torch.bfloat16)


def test_squares_stay_numbers_of_float32() -> None:
    """(1e19)^2 is a number of float32, the square of 8 times that is not; float64 has room."""
    schedule = diffkern.edm()
    with pytest.raises(ValueError, match="or in float64"):
        loss(schedule, torch.tensor([1e-19], dtype=torch.float64), "score", torch.float32)
    loss(schedule, torch.tensor([1e-19], dtype=torch.float64), "score", torch.float64)


def test_what_a_dtype_holds() -> None:
    assert most_in(torch.float16) == 65504 / 8
    assert most_in(torch.bfloat16) == pytest.approx(math.sqrt(torch.finfo(torch.float32).max) / 8)
    check_level(8188.0, torch.float16)
    with pytest.raises(ValueError, match=r"must be at most 8188 in float16, got 70000: use torch\.bfloat16 or torch"):
        check_level(70000.0, torch.float16)
    with pytest.raises(ValueError, match="got nan"):
        check_level(math.nan, torch.float32)
