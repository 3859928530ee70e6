"""Score-based sampling, training and likelihood of arXiv 2011.13456, transcribed for the tests and benchmarks.

score_sde_pytorch is not on PyPI, so this is the oracle of `diffkern.compat.score_sde`: plain torch, one line a formula,
from the paper (equations 7, 11, 14, 30, 33 to 46; algorithms 1 to 5; appendices B to G), with the conventions of the
authors' code: dt = -1/N on N times from 1 to eps, labels, norms averaged over the batch, and its order of draws. ``x``
is [B, C, H, W]; everything in the dtype of the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Net = Callable[[Tensor, Tensor], Tensor]


def col(v: Tensor) -> Tensor:
    return v[:, None, None, None]


@dataclass
class Process:
    """kind "vp", "subvp" or "ve"; (low, high) betas or sigmas; N steps."""

    kind: str
    low: float
    high: float
    N: int

    @cached_property
    def levels(self) -> Tensor:
        """betas/N, or sigmas."""
        if self.kind == "ve":
            return torch.exp(torch.linspace(math.log(self.low), math.log(self.high), self.N))
        return torch.linspace(self.low / self.N, self.high / self.N, self.N)

    @cached_property
    def noise(self) -> Tensor:
        """sqrt(1 - abar)."""
        return torch.sqrt(1.0 - torch.cumprod(1.0 - self.levels, 0))

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        if self.kind == "ve":
            return torch.zeros_like(x)
        return -0.5 * col(self.low + t * (self.high - self.low)) * x

    def diffusion(self, t: Tensor) -> Tensor:
        if self.kind == "ve":
            sigma = self.low * (self.high / self.low) ** t
            return sigma * torch.sqrt(torch.tensor(2 * (math.log(self.high) - math.log(self.low)), dtype=t.dtype))
        beta = self.low + t * (self.high - self.low)
        if self.kind == "vp":
            return torch.sqrt(beta)
        return torch.sqrt(beta * (1.0 - torch.exp(-2 * self.low * t - (self.high - self.low) * t**2)))

    def signal(self, t: Tensor) -> Tensor:
        if self.kind == "ve":
            return torch.ones_like(t)
        return torch.exp(-0.25 * t**2 * (self.high - self.low) - 0.5 * t * self.low)

    def std(self, t: Tensor) -> Tensor:
        if self.kind == "ve":
            return self.low * (self.high / self.low) ** t
        square = torch.exp(2.0 * (-0.25 * t**2 * (self.high - self.low) - 0.5 * t * self.low))
        return torch.sqrt(1.0 - square) if self.kind == "vp" else 1.0 - square

    def prior(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(*shape) * (self.high if self.kind == "ve" else 1)

    def number(self, t: Tensor) -> Tensor:
        return (t * (self.N - 1)).long()

    def neighbours(self, t: Tensor) -> tuple[Tensor, Tensor]:
        i, sigma = self.number(t), self.levels
        return sigma[i], torch.where(i == 0, torch.zeros_like(t), sigma[i - 1])

    def chain(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(f, G) of the discretised forward process."""
        if self.kind == "vp":
            beta = self.levels[self.number(t)]
            return col(torch.sqrt(1.0 - beta)) * x - x, torch.sqrt(beta)
        if self.kind == "ve":
            sigma, below = self.neighbours(t)
            return torch.zeros_like(x), torch.sqrt(sigma**2 - below**2)
        return self.drift(x, t) / self.N, self.diffusion(t) * math.sqrt(1 / self.N)

    def label(self, t: Tensor, continuous: bool) -> Tensor:
        if self.kind == "ve":
            return self.std(t) if continuous else torch.round((1 - t) * (self.N - 1)).long()
        return t * 999 if continuous or self.kind == "subvp" else t * (self.N - 1)

    def score(self, net: Net, x: Tensor, t: Tensor, continuous: bool) -> Tensor:
        label = self.label(t, continuous)
        m = net(x, label)
        if self.kind == "ve":
            return m
        if continuous or self.kind == "subvp":
            return -m / col(self.std(t))
        return -m / col(self.noise[label.long()])


def predict(
    p: Process, net: Net, x: Tensor, t: Tensor, how: str, flow: bool = False, continuous: bool = True
) -> tuple[Tensor, Tensor]:
    """(x', mean) of a predictor."""
    half = 0.5 if flow else 1.0
    if how == "none":
        return x, x
    if how == "euler_maruyama":
        z, g = torch.randn_like(x), p.diffusion(t)
        mean = x - (p.drift(x, t) - half * col(g) ** 2 * p.score(net, x, t, continuous)) / p.N
        return mean + (0.0 if flow else 1.0) * col(g) * math.sqrt(1 / p.N) * z, mean
    if how == "reverse_diffusion":
        f, g = p.chain(x, t)
        mean = x - (f - half * col(g) ** 2 * p.score(net, x, t, continuous))
        return mean + (0.0 if flow else 1.0) * col(g) * torch.randn_like(x), mean
    if p.kind == "ve":
        sigma, below = p.neighbours(t)
        mean = x + col(sigma**2 - below**2) * p.score(net, x, t, continuous)
        return mean + col(torch.sqrt(below**2 * (sigma**2 - below**2) / sigma**2)) * torch.randn_like(x), mean
    beta = p.levels[p.number(t)]
    mean = (x + col(beta) * p.score(net, x, t, continuous)) / col(torch.sqrt(1.0 - beta))
    return mean + col(torch.sqrt(beta)) * torch.randn_like(x), mean


def correct(
    p: Process, net: Net, x: Tensor, t: Tensor, how: str, snr: float, steps: int, continuous: bool = True
) -> tuple[Tensor, Tensor]:
    """(x', mean) of a corrector."""
    mean = x
    alpha = torch.ones_like(t) if p.kind == "ve" else 1.0 - p.levels[p.number(t)]
    for _ in range(steps if how != "none" else 0):
        score = p.score(net, x, t, continuous)
        z = torch.randn_like(x)
        if how == "langevin":
            ratio = z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
            e = (snr * ratio) ** 2 * 2 * alpha
        else:
            e = (snr * p.std(t)) ** 2 * 2 * alpha
        mean = x + col(e) * score
        x = mean + col(torch.sqrt(2 * e)) * z
    return x, mean


@torch.no_grad()
def pc_sample(
    p: Process,
    net: Net,
    shape: tuple[int, ...],
    predictor: str,
    corrector: str,
    snr: float = 0.16,
    steps: int = 1,
    flow: bool = False,
    continuous: bool = True,
    denoise: bool = True,
    eps: float = 1e-3,
) -> Tensor:
    """Algorithms 2 and 3 (and 4, 5): corrector, then predictor, at every time."""
    x = mean = p.prior(shape)
    for t in torch.linspace(1, eps, p.N):
        times = torch.ones(shape[0]) * t
        x, mean = correct(p, net, x, times, corrector, snr, steps, continuous)
        x, mean = predict(p, net, x, times, predictor, flow, continuous)
    return mean if denoise else x


def flow_drift(p: Process, net: Net, x: Tensor, t: Tensor) -> Tensor:
    """Equation 13."""
    return p.drift(x, t) - 0.5 * col(p.diffusion(t)) ** 2 * p.score(net, x, t, True)


@torch.no_grad()
def ode_sample(
    p: Process, net: Net, x: Tensor, eps: float = 1e-3, rtol: float = 1e-5, atol: float = 1e-5, method: str = "RK45"
) -> tuple[Tensor, int]:
    """(state, calls) by scipy on the flattened batch."""
    from scipy import integrate

    def slope(t: float, flat: Any) -> Any:
        state = torch.from_numpy(flat.reshape(x.shape)).to(x.dtype)
        return flow_drift(p, net, state, torch.full([len(x)], t, dtype=x.dtype)).numpy().reshape(-1)

    found = integrate.solve_ivp(slope, (1, eps), x.numpy().reshape(-1), rtol=rtol, atol=atol, method=method)
    return torch.from_numpy(found.y[:, -1].reshape(x.shape)).to(x.dtype), found.nfev


def likelihood(
    p: Process, net: Net, data: Tensor, probe: Tensor, offset: float = 7.0, eps: float = 1e-5, rtol: float = 1e-5,
    atol: float = 1e-5, method: str = "RK45",
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """(bits a dimension, latent, calls): equations 39 and 40, scipy on the flattened batch."""
    from scipy import integrate

    batch, dims = len(data), data[0].numel()

    def slope(t: float, flat: Any) -> Any:
        x = torch.from_numpy(flat[:-batch].reshape(data.shape)).to(data.dtype).requires_grad_()
        drift = flow_drift(p, net, x, torch.full([batch], t, dtype=data.dtype))
        (gradient,) = torch.autograd.grad((drift * probe).sum(), x)
        trace = (gradient * probe).flatten(1).sum(1)
        return np.concatenate([drift.detach().numpy().reshape(-1), trace.numpy()])

    start = np.concatenate([data.numpy().reshape(-1), np.zeros(batch)])
    found = integrate.solve_ivp(slope, (eps, 1), start, rtol=rtol, atol=atol, method=method)
    latent, change = found.y[:-batch, -1].reshape(data.shape), found.y[-batch:, -1]
    variance = p.high**2 if p.kind == "ve" else 1.0
    prior = -0.5 * dims * math.log(2 * math.pi * variance) - (latent**2).sum((1, 2, 3)) / (2 * variance)
    bits = -(prior + change) / math.log(2) / dims + offset
    return torch.from_numpy(bits).to(data.dtype), torch.from_numpy(latent).to(data.dtype), found.nfev


def reduced(errors: Tensor, mean: bool) -> Tensor:
    flat = errors.flatten(1)
    return flat.mean(1) if mean else 0.5 * flat.sum(1)


def sde_loss(
    p: Process, net: Net, batch: Tensor, mean: bool = True, continuous: bool = True, weighted: bool = True,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Equation 7 with lambda = std^2, or g^2."""
    t = torch.rand(len(batch)) * (1 - eps) + eps
    z = torch.randn_like(batch)
    std = col(p.std(t))
    score = p.score(net, col(p.signal(t)) * batch + std * z, t, continuous)
    if weighted:
        return (reduced((score + z / std) ** 2, mean) * p.diffusion(t) ** 2).mean()
    return reduced((score * std + z) ** 2, mean).mean()


def smld_loss(p: Process, net: Net, batch: Tensor, mean: bool = False) -> Tensor:
    """Equation 1, labels from the highest level down."""
    labels = torch.randint(0, p.N, (len(batch),))
    sigma = p.levels.flip(0)[labels]
    noise = torch.randn_like(batch) * col(sigma)
    errors = (net(batch + noise, labels) + noise / col(sigma) ** 2) ** 2
    return (reduced(errors, mean) * sigma**2).mean()


def ddpm_loss(p: Process, net: Net, batch: Tensor, mean: bool = True) -> Tensor:
    """Equation 3 with weights 1 - abar."""
    labels = torch.randint(0, p.N, (len(batch),))
    abar = torch.cumprod(1.0 - p.levels, 0)[labels]
    z = torch.randn_like(batch)
    return reduced((net(col(abar.sqrt()) * batch + col((1.0 - abar).sqrt()) * z, labels) - z) ** 2, mean).mean()
