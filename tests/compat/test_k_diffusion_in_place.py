"""compat.k_diffusion: callbacks that edit count as in k-diffusion; models that write into their input change nothing.

And states of 16 bits: updates below half a unit add up.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.k_diffusion_cases import ALL, CHURN, SDE, Network, error, levels, needs_k_diffusion, start, theirs
from torch import Tensor

from diffkern.compat import k_diffusion as ours


def edited(module: Any, name: str, what: str, **options: Any) -> Tensor:
    """The result under a callback that edits the state, the output, or both, in some steps, and draws a number."""

    def callback(info: dict[str, Any]) -> None:
        torch.rand(1)
        if info["i"] in (1, 2, 5) and "x" in what:
            info["x"][:, 0].mul_(0.5).add_(0.1)
        if info["i"] in (2, 4) and "m" in what:
            info["denoised"].clamp_(-0.5, 0.5)

    torch.manual_seed(5)
    x, sigmas = start(torch.float64), levels(dtype=torch.float64)
    before = x.clone()
    if name in SDE:
        options["noise_sampler"] = lambda a, b: torch.randn_like(x)
    function = getattr(module.sampling, f"sample_{name}")
    model = options.pop("model", Network())
    out: Tensor = function(model, x, sigmas, callback=callback, disable=True, **options)
    assert module is theirs or torch.equal(x, before)
    return out


@needs_k_diffusion
@pytest.mark.parametrize("what", ["x", "m", "xm"])
@pytest.mark.parametrize("name", ALL)
def test_edits_count_as_in_k_diffusion(name: str, what: str) -> None:
    """Those of x in every later step; those of `denoised` where the original reads it afterwards."""
    limit = 1e-4 if name == "lms" else 1e-11  # the original integrates numerically
    assert error(edited(ours, name, what), edited(theirs, name, what)) < limit


@needs_k_diffusion
@pytest.mark.parametrize("name", CHURN)
def test_edits_count_as_in_k_diffusion_with_churn(name: str) -> None:
    churn = {"s_churn": 3.0, "s_noise": 1.01}
    assert error(edited(ours, name, "xm", **churn), edited(theirs, name, "xm", **churn)) < 1e-11


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "dpmpp_2m"])
def test_edits_count_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        found = edited(ours, name, "xm")
    assert torch.equal(found, edited(ours, name, "xm"))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("first", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_what_a_model_writes_changes_nothing(name: str, first: int, inference: bool) -> None:
    calls = 0

    class Scribbling(Network):
        def __call__(self, x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
            nonlocal calls
            calls += 1
            m = super().__call__(x, sigma)
            if calls >= first:
                x.fill_(math.nan)
                sigma.fill_(math.nan)
            return m

    with torch.inference_mode() if inference else nullcontext():
        found = edited(ours, name, "xm", model=Scribbling())
    assert torch.equal(found, edited(ours, name, "xm"))


def test_a_callback_does_not_change_the_callers_sigmas() -> None:
    x, sigmas = start(), levels()
    before = sigmas.clone()
    ours.sampling.sample_dpmpp_2m(Network(), x, sigmas, disable=True, callback=lambda info: info["sigma"].zero_())
    assert torch.equal(sigmas, before)


# --- 16 bits ---------------------------------------------------------------------------------------------------------


@needs_k_diffusion
@pytest.mark.parametrize("steps", [10, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_many_small_steps_add_up(name: str, dtype: torch.dtype, steps: int) -> None:
    """Gaussian data of deviation 0.5: the exact flow ends at x 0.5/sqrt(0.25 + sigma^2), from a level of 10 on."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.double().reshape(-1, 1, 1, 1)
        return (0.25 / (0.25 + level**2) * x.double()).to(x.dtype)

    sigmas = levels(steps, first=10.0, last=0.01)
    x = (10.0 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    with torch.no_grad():
        want = getattr(ours.sampling, f"sample_{name}")(model, x.double(), sigmas.double(), disable=True)
        found, other = (
            getattr(module.sampling, f"sample_{name}")(model, x, sigmas, disable=True).double()
            for module in (ours, theirs)
        )
    unit = 2.0**-8 if dtype is torch.bfloat16 else 2.0**-11
    away, theirs_away = ((value - want).norm() / want.norm() for value in (found, other))
    assert away <= theirs_away + unit
    assert away < 4.0 * unit


def test_a_callback_sees_and_edits_a_state_of_16_bits() -> None:
    x, sigmas = start(torch.bfloat16), levels()
    seen: set[torch.dtype] = set()

    def callback(info: dict[str, Any]) -> None:
        seen.add(info["x"].dtype)
        info["x"][:, 1] = 0.0

    found, plain = (
        ours.sampling.sample_dpmpp_2m(lambda x, sigma: 0.5 * x, x, sigmas, disable=True, callback=c)
        for c in (callback, None)
    )
    assert seen == {found.dtype} == {torch.bfloat16}
    assert torch.equal(found[:, 0], plain[:, 0])
    assert error(found[:, 1], plain[:, 1]) > 0.1
