"""Plausible mistakes: what has one certain meaning works, all else is one sentence with the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffkern
from diffkern import samplers, schedules
from diffkern.checks import meant

S, VP = schedules.linear(20), schedules.vp()
X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
T = torch.tensor([10, 10])
PLAN = samplers.ddim(S, 4)


def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


@pytest.mark.parametrize("ten", [10, np.int64(10), np.array([10, 10]), torch.tensor(10), [10, 10]], ids=str)
def test_a_time_is_a_time(ten: Any) -> None:
    """Numbers, lists and NumPy's arrays: the same bits as the tensor."""
    assert torch.equal(diffkern.noised(X, ten, S, seeds=0), diffkern.noised(X, T, S, seeds=0))
    assert torch.equal(diffkern.prediction_loss(X, X, ten, S, seeds=0), diffkern.prediction_loss(X, X, T, S, seeds=0))
    assert torch.equal(diffkern.simple_loss(half, X, T, S, seeds=0), diffkern.simple_loss(half, X, T, S, seeds=0))
    half_way = torch.full((2,), 0.5, dtype=torch.float64)
    assert torch.equal(diffkern.noised(X, 0.5, VP, seeds=0), diffkern.noised(X, half_way, VP, seeds=0))


class Image:
    """Stands for PIL.Image.Image, by its module."""

    __module__ = "PIL.Image"


MISTAKES: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: diffkern.noised(X.numpy(), T, S, seeds=0),
        "x0 must be a tensor [B, ...], got ndarray: torch.as_tensor(x0) makes one",
    ),
    (
        lambda: diffkern.noised((X, T), T, S, seeds=0),
        "x0 must be a tensor [B, ...], got tuple of 2: torch.stack makes one of a list, x0[0] is the first of a pair",
    ),
    (
        lambda: diffkern.noised(Image(), T, S, seeds=0),
        "x0 must be a tensor [B, ...], got Image: torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 127.5",
    ),
    (
        lambda: diffkern.noised(X, S, T, seeds=0),
        "t must be a time or one a sample, got DiscreteSchedule: are the arguments in another order?",
    ),
    (
        lambda: diffkern.noised(X, T, "linear", seeds=0),
        "schedule must be a diffkern Schedule, got str: diffkern.linear() makes one",
    ),
    (
        lambda: diffkern.noised(X, T, diffkern.linear, seeds=0),
        "schedule must be a diffkern Schedule, got function: call it, as in diffkern.linear()",
    ),
    (
        lambda: diffkern.simple_loss(X, half, T, S),
        "model must be a function of (x, t), got Tensor: are the arguments in another order?",
    ),
    (
        lambda: diffkern.simple_loss(half, half, T, S),
        "x0 must be a tensor [B, ...], got function, which can be called: are the arguments in another order?",
    ),
    (lambda: diffkern.simple_loss(half, X, T, S, weight="min-snr"), "got 'min-snr': did you mean 'min_snr'?"),
    (
        lambda: diffkern.prediction_loss(X, X, T, S, seeds=0, reduction="avg"),
        "reduction must be one of none, mean, sum, got 'avg'",
    ),
    (lambda: diffkern.ddim(S, 4, spacing="trailin"), "got 'trailin': did you mean 'trailing'?"),
    (lambda: diffkern.euler(S, 4, spacing="Karras"), "got 'Karras': did you mean 'karras'?"),
    (
        lambda: diffkern.heun(S, num_steps=4),
        "heun() got an unexpected keyword argument 'num_steps': did you mean 'steps'?",
    ),
    (lambda: diffkern.ddim("linear", 4), "schedule must be a diffkern Schedule, got str: diffkern.linear() makes one"),
    (lambda: samplers.get_sampler("DDIMM"), "got 'DDIMM': did you mean 'ddim'?"),
    (lambda: samplers.get_sampler("dpm++_2mm"), "got 'dpm++_2mm': did you mean 'dpmpp_2m'?"),
    (lambda: diffkern.simple_loss(half, X, T, S, "velocty"), "got 'velocty': did you mean 'velocity'?"),
    (
        lambda: diffkern.sample(half, X, "ddim"),
        "plan must be a Plan, got 'ddim': make one with diffkern.ddim(schedule, steps)",
    ),
    (
        lambda: diffkern.sample(half, X, "DDIM"),
        "plan must be a Plan, got 'DDIM': make one with diffkern.ddim(schedule, steps)",
    ),
    (
        lambda: diffkern.sample(half, X, diffkern.ddim),
        "plan must be a Plan, got function: call the sampler, as in diffkern.ddim(schedule, 50)",
    ),
    (
        lambda: diffkern.sample(half, X, S),
        "plan must be a Plan, got DiscreteSchedule: a sampler makes one of a schedule, as in diffkern.",
    ),
    (
        lambda: diffkern.sample(X, half, PLAN),
        "model must be a function of (x, t), got Tensor: are the arguments in another order?",
    ),
    (
        lambda: diffkern.sample(half, X.numpy(), PLAN),
        "x must be a tensor [B, ...], got ndarray: torch.as_tensor(x) makes one",
    ),
    (
        lambda: diffkern.sample(half, X, PLAN, guidance_scale=2.0),
        "sample() got an unexpected keyword argument 'guidance_scale': did you mean 'guidance'?",
    ),
    (
        lambda: diffkern.sample(half, X, PLAN, seed=0),
        "sample() got an unexpected keyword argument 'seed': did you mean 'seeds'?",
    ),
    (lambda: diffkern.initial("ddim", (2, 3), 0), "plan must be a Plan, got 'ddim'"),
    (
        lambda: diffkern.predictor_corrector(X, half, VP, 4),
        "model must be a function of (x, t), got Tensor: are the arguments in another order?",
    ),
    (lambda: diffkern.rk45(half, X.numpy(), VP), "x must be a tensor [B, ...], got ndarray"),
]


@pytest.mark.parametrize(("call", "sentence"), MISTAKES, ids=[sentence[:60] for _, sentence in MISTAKES])
def test_a_mistake_is_answered_with_the_way_out(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "known", "expected"),
    [
        ("epsilon", ["eps", "v"], "eps"),
        ("sample", ["eps", "x0"], "x0"),
        ("Euler-Ancestral", ["euler", "euler_ancestral"], "euler_ancestral"),
        ("nothing like it", ["eps", "v"], None),
        (3, ["eps"], None),
    ],
)
def test_what_is_meant(value: object, known: list[str], expected: str | None) -> None:
    assert meant(value, known) == expected
