"""float16 states end at 65504: noise levels above an eighth of it, 8188, are refused with the dtypes that work."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffkern
from diffkern.compat import k_diffusion

SHAPE = (2, 3)
SENTENCE = r"must be at most 8188 in float16, got 100000: use torch\.bfloat16 or torch\.float32"
PLAN = diffkern.heun(diffkern.edm(sigma_max=1e5), 4, prediction="x0")
HALF = torch.zeros(SHAPE, dtype=torch.float16)


def model(x: torch.Tensor, sigma: torch.Tensor, **_: Any) -> torch.Tensor:
    """E[x0 given x] of standard normal data."""
    return (x.double() / (1.0 + sigma.double().reshape(-1, 1) ** 2)).to(x.dtype)


def test_float16_is_refused_with_the_dtype_that_works() -> None:
    with pytest.raises(ValueError, match=f"the noise level of heun {SENTENCE}"):
        diffkern.initial(PLAN, SHAPE, 0, torch.float16)
    with pytest.raises(ValueError, match=f"the noise level of heun {SENTENCE}"):
        diffkern.sample(model, HALF, PLAN)
    with pytest.raises(ValueError, match=f"sigma of edm {SENTENCE}"):
        diffkern.noised(HALF, torch.full((2,), 1e5), diffkern.edm(), "eps", seeds=diffkern.seeds(0, 2))
    with pytest.raises(ValueError, match=f"sigmas {SENTENCE}"):
        k_diffusion.sample_euler(model, HALF, torch.tensor([1e5, 1.0, 0.0]), disable=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_wider_dtypes_take_such_levels(dtype: str) -> None:
    x = diffkern.initial(PLAN, SHAPE, 0, getattr(torch, dtype))
    assert float(x.abs().max()) > 1e4
    assert bool(torch.isfinite(diffkern.sample(model, x, PLAN)).all())


def test_levels_that_fit_are_taken() -> None:
    plan = diffkern.heun(diffkern.edm(sigma_max=8000.0), 4, prediction="x0")
    x = diffkern.initial(plan, SHAPE, 0, torch.float16)
    assert bool(torch.isfinite(diffkern.sample(model, x, plan)).all())
    # EDM's network is given c_in x, of which the level of x is no part.
    noised = diffkern.noised(HALF, torch.full((2,), 1e5), diffkern.edm(), "edm", seeds=diffkern.seeds(0, 2))
    assert bool(torch.isfinite(noised).all())
