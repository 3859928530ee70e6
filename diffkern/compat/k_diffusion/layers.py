"""Denoisers of EDM-preconditioned networks: D(x, sigma) = c_skip x + c_out F(c_in x, sigma), as k-diffusion has them.

The network is given sigma itself (EDM's own code gives ln(sigma)/4). sigma is [B]. Combining is one fused op, the loss
one op before the network and one after it, in float32 for 16-bit inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import ops
from diffkern.compat.k_diffusion.utils import append_dims, to_d
from diffkern.compat.kit import rows
from diffkern.names import Prediction
from diffkern.schedules.makers import edm

Weighting = Callable[[Tensor], Tensor]


class Denoiser(nn.Module):
    """k-diffusion's Denoiser(inner_model, sigma_data, weighting): ``forward`` is D, ``loss`` is [B].

    weighting of the error of F: "karras" 1, "soft-min-snr" (sigma sigma_data/(sigma^2 + sigma_data^2))^2, "snr"
    sigma_data^2/(sigma^2 + sigma_data^2), or a function of sigma. ``scales`` above 1 (a loss weighted over frequencies)
    is not offered.
    """

    def __init__(
        self, inner_model: nn.Module, sigma_data: float = 1.0, weighting: str | Weighting = "karras", scales: int = 1
    ) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data
        if scales != 1:
            raise ValueError(f"scales must be 1 (no loss over frequencies), got {scales!r}")
        self.scales = scales
        named: dict[str, Weighting] = {
            "karras": torch.ones_like,
            "soft-min-snr": self._weighting_soft_min_snr,
            "snr": self._weighting_snr,
        }
        if not callable(weighting) and weighting not in named:
            raise ValueError(f"Unknown weighting type {weighting}")
        self.weighting = weighting if callable(weighting) else named[weighting]

    def _weighting_soft_min_snr(self, sigma: Tensor) -> Tensor:
        return (sigma * self.sigma_data) ** 2 / (sigma**2 + self.sigma_data**2) ** 2

    def _weighting_snr(self, sigma: Tensor) -> Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in), arXiv 2206.00364, table 1."""
        return edm_scalings(sigma, self.sigma_data)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """weight mean (F - (x0 - c_skip x)/c_out)^2 of x = x0 + sigma noise, [B]."""
        return edm_loss(
            lambda x: self.inner_model(x, sigma, **kwargs),
            input, noise, sigma, self.sigma_data, weight=self.weighting(sigma),
        )  # fmt: skip

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The denoised estimate."""
        c_skip, c_out, c_in = self.get_scalings(wide(sigma))
        return combined(input, c_skip, self.inner_model(scaled(input, c_in), sigma, **kwargs), c_out)


class SimpleLossDenoiser(Denoiser):
    """`Denoiser` whose loss is that of eps, [B]."""

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """mean (eps - noise)^2 with eps = (x - D)/sigma."""
        noised = input + noise * append_dims(sigma, input.ndim)
        eps = to_d(noised, sigma, self(noised, sigma, **kwargs))
        return (eps - noise).pow(2).flatten(1).mean(1)


def edm_scalings(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) in the dtype of sigma."""
    total = sigma**2 + sigma_data**2
    root = total**0.5
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root


def wide(sigma: Tensor) -> Tensor:
    """sigma in float32 where it is narrower."""
    return rows.as_dtype(sigma, rows.wide(sigma.dtype))


def scaled(x: Tensor, c: Tensor) -> Tensor:
    """c x with c [] or [B], in the dtype of x."""
    return (x * append_dims(c, x.ndim)).to(x.dtype)


def combined(x: Tensor, c_x: Tensor | None, m: Tensor, c_m: Tensor) -> Tensor:
    """c_x x + c_m m, each factor [] or [B] (c_x None: 1): one op, rounded once, in the wider dtype of the two."""
    x = rows.as_dtype(x, rows.promote(x.dtype, m.dtype))
    table = rows.of_samples(x.shape[0], x.device, a=1.0 if c_x is None else c_x, d=c_m)
    index = torch.arange(x.shape[0], device=x.device)
    return ops.step(x, m, table=table, index=index)[0]


def edm_loss(
    network: Callable[[Tensor], Tensor],
    x0: Tensor,
    noise: Tensor,
    sigma: Tensor,
    sigma_data: float,
    *,
    prediction: Prediction = "edm",
    sign: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """[B]: weight mean (network(c_in x) - sign target)^2, the target that of the prediction on `schedules.edm`."""
    schedule = edm(sigma_data=sigma_data)
    t = sigma.to(torch.float64)
    levels = schedule.coefficients(prediction, t)  # (1, sigma, u, v): target = u x0 + v noise
    c_in = schedule.preconditioning(t)[2]
    ones = torch.ones_like(t)
    noise = noise.to(x0.dtype)
    x = ops.noising(x0, torch.cat([levels[:, :2] * c_in[:, None], levels[:, 2:]], 1), noise=noise)[0]
    factor = ones if weight is None else weight.to(torch.float64)
    return ops.loss(
        network(x), x0, torch.cat([sign * levels[:, 2:], factor[:, None]], 1), noise=noise, reduction="none"
    )
