"""What the tests of compat.guided_diffusion share: networks, states, and how far two results are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.compat import guided_diffusion as gd

MEANS = ("EPSILON", "START_X", "PREVIOUS_X")
VARIANCES = ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE")
SHAPE = (4, 2, 3, 5)
EXACT = 1e-12
ROUNDED = 1e-5
"""What float32's rounding of the tables comes to, relative to the largest element."""


def network(variance: str = "FIXED_SMALL", width: float = 1000.0) -> Callable[..., Tensor]:
    """A smooth model, different at every element and time; float64 inside; y is a label a sample."""

    def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        ones = (1,) * (x.dim() - 1)
        wide, time = x.double(), t.double().reshape(-1, *ones) / width
        ramp = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).reshape(x.shape[1:])
        out = 0.7 * wide * (0.5 + time) + 0.3 * torch.sin(3 * wide + ramp + 5 * time)
        if y is not None:
            out = out + 0.1 * y.double().reshape(-1, *ones)
        if variance.startswith("LEARNED"):
            # LEARNED is the log-variance itself.
            second = torch.tanh(0.5 * wide + ramp) - (3.0 if variance == "LEARNED" else 0.0)
            out = torch.cat([out, second], 1)
        return out.to(x.dtype)

    return model


def change(x0: Tensor) -> Tensor:
    """A denoised_fn."""
    return 0.9 * x0 + 0.02


def classifier(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """A cond_fn."""
    time = t.to(x.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    return 0.3 * torch.sin(x) + 1e-4 * time


def state(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """8-bit data in [-1, 1]; the first and the last bin are met."""
    whole = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).double()
    whole.view(-1)[:2] = torch.tensor([0.0, 255.0])
    return (whole / 127.5 - 1).to(dtype)


def error(found: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest element; NaN counts as infinite."""
    found, want = found.detach(), want.detach()
    gap = (found.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-300)
    return float(torch.nan_to_num(gap, nan=float("inf")))


def seeded(call: Callable[[], Any], seed: int = 5) -> tuple[Any, Tensor]:
    """(what a call returns, what torch's generator gives next)."""
    torch.manual_seed(seed)
    return call(), torch.rand(3)


def make(
    mean: str = "EPSILON",
    variance: str = "FIXED_SMALL",
    betas: Any = None,
    cls: type[gd.GaussianDiffusion] = gd.GaussianDiffusion,
    rescale: bool = False,
    **options: Any,
) -> Any:
    return cls(
        betas=gd.get_named_beta_schedule("linear", 100) if betas is None else betas,
        model_mean_type=gd.ModelMeanType[mean],
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType.MSE,
        rescale_timesteps=rescale,
        **options,
    )


def spaced(keep: Any = "10", T: int = 1000, **options: Any) -> Any:
    betas = gd.get_named_beta_schedule("linear", T)
    return make(betas=betas, cls=gd.SpacedDiffusion, use_timesteps=gd.space_timesteps(T, keep), **options)  # type: ignore[arg-type]
