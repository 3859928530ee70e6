"""Networks, levels and runs that the tests of compat.k_diffusion share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from helpers import k_diffusion_oracle
from helpers.lazy import needs

theirs = k_diffusion_oracle.Peer()

CHURN = ("euler", "heun", "dpm_2")
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
ALL = (*CHURN, *ANCESTRAL, *SDE, "lms", "dpmpp_2m")
STEP = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Of a step, relative to the largest element of the state."""


class Network:
    """A denoiser, smooth and different at every element; remembers what it was given."""

    def __init__(self) -> None:
        self.levels: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        self.levels.append(sigma)
        self.states.append(x)
        wide = x.double()
        level = sigma.double().reshape(-1, *(1,) * (x.ndim - 1))
        ramp = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).reshape(x.shape[1:])
        return (wide / (1 + level**2).sqrt() + 0.3 * torch.tanh(wide / (1 + level) + ramp) + shift).to(x.dtype)


def levels(n: int = 9, dtype: torch.dtype = torch.float32, first: float = 60.0, last: float = 0.03) -> Tensor:
    """Karras's, arXiv 2206.00364, eq. 5, and 0."""
    roots = torch.linspace(first ** (1 / 7), last ** (1 / 7), n)
    return torch.cat([roots**7, torch.zeros(1)]).to(dtype)


needs_k_diffusion = needs(*k_diffusion_oracle.NEEDED)
"""Of tests that ask the original; the others run without it."""


def start(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3, 5, 7)) -> Tensor:
    return 60.0 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def run(module: Any, name: str, x: Tensor, sigmas: Tensor, **options: Any) -> tuple[Tensor, list[dict[str, Any]], Any]:
    """(result, what the callback saw, what torch's generator gives next), noise from a recorded sampler for SDEs."""
    torch.manual_seed(11)
    seen: list[dict[str, Any]] = []
    model = options.pop("model", None) or Network()
    if name in SDE and "noise_sampler" not in options:
        options["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(x)
    function = getattr(module.sampling, f"sample_{name}")
    out = function(model, x, sigmas, callback=seen.append, disable=True, **options)
    return out, seen, torch.rand(3)


def error(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max() / want.abs().max())
