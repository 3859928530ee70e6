"""Conditional paths given by functions of the data point: any mean, any width (lecture 000)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.checks import unknown
from diffkern.draws import draw_seeds
from diffkern.names import Reduction, TimesName
from diffkern.objectives.time_sampling import TimeSampler, get_time_sampler
from diffkern.ops import Seeds
from diffkern.schedules.base import Time, as_time
from diffkern.schedules.paths import FlowSchedule
from diffkern.simulate._process import shaped

Moment = Callable[[Tensor, Tensor], Tensor | float]
"""A function of the data points z [B, ...] and times shaped [B, 1, ...], or [], in z's dtype; see `ConditionalPath`."""
REDUCTIONS = get_args(Reduction)


class ConditionalPath:
    """p_t(x given z) = N(mu_t(z), sigma_t(z)^2 I) by functions ``mu(z, t)`` and ``sigma(z, t)`` of torch operations.

        x_t = mu_t(z) + sigma_t(z) eps,     u_t(x given z) = sigma_dot/sigma (x - mu) + mu_dot

    u is the field whose flow is x -> sigma_t(z) x + mu_t(z), noise at t = 0 and data at t = 1: mu_0 = 0, sigma_0 = 1,
    mu_1 = z and a small sigma_1, which is up to the caller (lecture 000, "Construction of the conditional vector
    field"; arXiv 2210.02747, theorem 3). The dots are derivatives in t, by forward-mode automatic differentiation
    unless ``mu_slope(z, t)`` and ``sigma_slope(z, t)`` give them; every value must depend on the time of its own sample
    alone. ``mu`` returns the shape of z; ``sigma`` a number, one a sample [B], or anything that broadcasts with z (a
    width an element then). z is [B, ...], t a number, [] or [B]; t reaches the functions as [] or [B, 1, ...] in z's
    dtype, 16-bit z and x as float32. Fields and densities need sigma > 0, and raise ValueError on the CPU where it is
    not. A path alpha_t z + sigma_t eps has closed forms without differentiation: `GaussianPath`.
    """

    def __init__(
        self, mu: Moment, sigma: Moment, *, mu_slope: Moment | None = None, sigma_slope: Moment | None = None
    ) -> None:
        given = {"mu": mu, "sigma": sigma, "mu_slope": mu_slope, "sigma_slope": sigma_slope}
        for name, function in given.items():
            if not callable(function) and (function is not None or name in ("mu", "sigma")):
                raise ValueError(f"{name} must be a function of (z, t), got {function!r}")
        self.mu, self.sigma, self.mu_slope, self.sigma_slope = mu, sigma, mu_slope, sigma_slope

    def mean(self, z: Tensor, t: Time) -> Tensor:
        """mu_t(z), in the shape of z."""
        return _mean("mu", self.mu, z, _times(z, t))

    def width(self, z: Tensor, t: Time) -> Tensor:
        """sigma_t(z), expanded to the shape of z."""
        return _width("sigma", self.sigma, z, _times(z, t))

    def moments(self, z: Tensor, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(mu, sigma, mu_dot, sigma_dot), each in the shape of z."""
        at = _times(z, t)
        mu, mu_dot = _with_slope(_mean, "mu", self.mu, self.mu_slope, z, at)
        sigma, sigma_dot = _with_slope(_width, "sigma", self.sigma, self.sigma_slope, z, at)
        return mu, sigma, mu_dot, sigma_dot

    def sample(
        self,
        z: Tensor,
        t: Time,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """mu + sigma eps in z's dtype; eps by address (`seeds`, as everywhere), given, or from torch's generator."""
        eps = _noise(z, seeds, noise, generator)
        wide = _wide(z)
        return (self.mean(wide, t) + self.width(wide, t) * eps.to(wide.dtype)).to(z.dtype)

    def vector_field(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """u_t(x given z) = sigma_dot/sigma (x - mu) + mu_dot, in x's dtype."""
        same_shape(x, z)
        mu, sigma, mu_dot, sigma_dot = self.moments(_wide(z), t)
        return (_positive(sigma_dot, sigma) * (x - mu) + mu_dot).to(x.dtype)

    def score(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """d/dx ln p_t(x given z) = -(x - mu)/sigma^2, in x's dtype."""
        same_shape(x, z)
        wide = _wide(z)
        sigma = self.width(wide, t)
        return (_positive(self.mean(wide, t) - x, sigma) / sigma).to(x.dtype)

    def log_density(self, x: Tensor, z: Tensor, t: Time) -> Tensor:
        """ln p_t(x given z) in nats, [B] float64."""
        same_shape(x, z)
        z = z.to(torch.float64)
        sigma = self.width(z, t)
        eps = _positive(x.to(torch.float64) - self.mean(z, t), sigma)
        return (-0.5 * eps.square() - 0.5 * math.log(2.0 * math.pi) - sigma.log()).flatten(1).sum(1)

    def loss(
        self,
        model: Callable[..., Tensor],
        z: Tensor,
        t: Tensor | None = None,
        *,
        times: TimesName | TimeSampler = "uniform",
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        reduction: Reduction = "mean",
        **model_kwargs: Any,
    ) -> Tensor:
        """Conditional flow matching: mean |model(x_t, t) - (mu_dot + sigma_dot eps)|^2 at x_t = mu + sigma eps.

        z [B, ...] is the data; t [B] is drawn from ``times`` if not given, by address where ``seeds`` are; eps as in
        `sample`. The model is given x_t in z's dtype and t [B]. ``reduction``: "none" ([B], the mean over a sample's
        elements), "mean", "sum". float32 or float64; differentiable in the model and in what mu and sigma are made of.
        arXiv 2210.02747, eq. 9; lectures 000, 003.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(unknown("reduction", reduction, REDUCTIONS))
        if seeds is None and noise is None:
            seeds = draw_seeds(len(z), device=z.device)
        elif seeds is not None:
            seeds = ops.as_seeds(seeds, len(z), z.device)
        if t is None:
            t = get_time_sampler(times).sample(len(z), FlowSchedule(), seeds=seeds, device=z.device)
        eps = _noise(z, seeds, noise, None)
        wide = _wide(z)
        mu, sigma, mu_dot, sigma_dot = self.moments(wide, t)
        eps = eps.to(wide.dtype)
        given = as_time(t).to(z.device, wide.dtype).expand(len(z))
        m = shaped("model", model((mu + sigma * eps).to(z.dtype), given, **model_kwargs), z)
        each = (m.to(wide.dtype) - (mu_dot + sigma_dot * eps)).square().flatten(1).mean(1)
        return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def conditional_path(
    mu: Moment, sigma: Moment, *, mu_slope: Moment | None = None, sigma_slope: Moment | None = None
) -> ConditionalPath:
    """See `ConditionalPath`: ``conditional_path(lambda z, t: t * z, lambda z, t: 1 - 0.99 * t)`` is a flow's."""
    return ConditionalPath(mu, sigma, mu_slope=mu_slope, sigma_slope=sigma_slope)


def _wide(z: Tensor) -> Tensor:
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _times(z: Tensor, t: Time) -> Tensor:
    """t as the functions take it: [] or [B, 1, ...], in z's dtype and on its device."""
    if z.ndim == 0 or not z.is_floating_point():
        raise ValueError(f"z must be floating-point data [B, ...], got {z.dtype} of shape {list(z.shape)}")
    at = as_time(t).to(z.device, z.dtype)
    if at.ndim == 0:
        return at
    if at.shape != z.shape[:1]:
        raise ValueError(f"t must be a number or one time a sample, shape [{len(z)}], got shape {list(at.shape)}")
    return at.reshape(-1, *(1,) * (z.ndim - 1))


def _mean(name: str, function: Moment, z: Tensor, t: Tensor) -> Tensor:
    value = torch.as_tensor(function(z, t), dtype=z.dtype, device=z.device)
    if value.shape != z.shape:
        raise ValueError(f"{name} must return the shape of z, {list(z.shape)}, got {list(value.shape)}")
    return value


def _width(name: str, function: Moment, z: Tensor, t: Tensor) -> Tensor:
    value = torch.as_tensor(function(z, t), dtype=z.dtype, device=z.device)
    if value.ndim == 1 and z.ndim > 1 and value.shape == z.shape[:1]:
        value = value.reshape(-1, *(1,) * (z.ndim - 1))
    try:
        return value.expand(z.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must return a number, one a sample [{len(z)}], or what broadcasts to the shape of z, "
            f"{list(z.shape)}, got {list(value.shape)}"
        ) from None


def _with_slope(
    checked: Callable[[str, Moment, Tensor, Tensor], Tensor],
    name: str,
    function: Moment,
    slope: Moment | None,
    z: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """(value, its derivative in t)."""
    if slope is not None:
        return checked(name, function, z, t), checked(name + "_slope", slope, z, t)
    found = torch.func.jvp(lambda at: checked(name, function, z, at), (t,), (torch.ones_like(t),))
    return found[0], found[1]


def _positive(value: Tensor, sigma: Tensor) -> Tensor:
    """value/sigma, on the CPU checked."""
    if sigma.device.type == "cpu" and not bool((sigma > 0).all()):
        raise ValueError(f"sigma must be positive for a density or a field, got {sigma.min().item()}")
    return value / sigma


def stored_noise(
    z: Tensor, seeds: Seeds | None, noise: Tensor | None, generator: torch.Generator | None
) -> Tensor | None:
    """eps as a tensor, the one given or one of torch's generator; None where it is that of the seeds."""
    if sum(v is not None for v in (seeds, noise, generator)) > 1:
        raise ValueError("give one of seeds, noise and generator, got several")
    if seeds is not None or noise is not None:
        return noise
    device = z.device if generator is None else generator.device
    return torch.randn(z.shape, dtype=z.dtype, device=device, generator=generator).to(z.device)


def _noise(z: Tensor, seeds: Seeds | None, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    eps = stored_noise(z, seeds, noise, generator)
    if eps is None:
        assert seeds is not None
        return ops.randn(z.shape, ops.as_seeds(seeds, len(z), z.device), streams.TRAINING, dtype=z.dtype)
    if eps.shape != z.shape:
        raise ValueError(f"noise must have the shape of z, {list(z.shape)}, got {list(eps.shape)}")
    return eps


def same_shape(x: Tensor, z: Tensor) -> None:
    if x.shape != z.shape or x.ndim == 0:
        raise ValueError(f"x and z must have one shape [B, ...], got {list(x.shape)} and {list(z.shape)}")
