"""k-diffusion's samplers, same signatures: each is a plan of `diffkern.samplers` run with one fused op a model call.

A model is called as ``model(x, sigma[B], **extra_args)`` and returns the denoised estimate. ``sigmas`` fall strictly,
usually to 0; they are read to the host once. Coefficients are float64; the state's dtype is that of k-diffusion's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffkern.compat.k_diffusion._noise import BrownianTreeNoiseSampler, NoiseSampler
from diffkern.compat.k_diffusion._runs import (
    Callback,
    Model,
    brownian_over,
    churned,
    levels_of,
    noised,
    plan_of,
    sde_plan,
)
from diffkern.compat.k_diffusion.utils import append_zero, to_d
from diffkern.samplers.ancestral import euler_ancestral
from diffkern.samplers.dpm_2 import dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral
from diffkern.samplers.dpm_solver import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde
from diffkern.samplers.multistep import lms
from diffkern.samplers.runge_kutta import euler, heun
from diffkern.schedules import grids
from diffkern.schedules.makers import edm
from diffkern.simulate import likelihood

__all__ = [
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]


# ------------------------------------------------------------------------------------------------------ noise levels
def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str = "cpu"
) -> Tensor:
    """`grids.karras_sigmas` in torch's default dtype: n levels even in sigma^(1/rho), and 0."""
    return _rounded(grids.karras_sigmas(n, float(sigma_min), float(sigma_max), rho), device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: torch.device | str = "cpu") -> Tensor:
    """`grids.exponential_sigmas` in torch's default dtype: n levels even in ln sigma, and 0."""
    return _rounded(grids.exponential_sigmas(n, float(sigma_min), float(sigma_max)), device)


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: torch.device | str = "cpu"
) -> Tensor:
    """`grids.polyexponential_sigmas` in torch's default dtype: n levels whose ln sigma is a power rho, and 0."""
    return _rounded(grids.polyexponential_sigmas(n, float(sigma_min), float(sigma_max), rho), device)


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: torch.device | str = "cpu"
) -> Tensor:
    """`grids.vp_sigmas` in torch's default dtype: n levels even in the time of the VP SDE, and 0."""
    return _rounded(grids.vp_sigmas(n, beta_d, beta_min, eps_s), device)


def _rounded(sigmas: Tensor, device: torch.device | str) -> Tensor:
    return sigmas.to(torch.get_default_dtype()).to(device)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(sigma_down, sigma_up) of an ancestral step; numbers or 0-dim tensors."""
    if not eta:
        return sigma_to, 0.0
    sigma_up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent noise of torch's generator, whatever the levels."""
    return lambda sigma, sigma_next: torch.randn_like(x)


# ---------------------------------------------------------------------------------------------------------- samplers
@torch.no_grad()
def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """`samplers.euler` with churn (arXiv 2206.00364, algorithm 2, without the second order)."""
    return churned(euler, model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """`samplers.heun` with churn (arXiv 2206.00364, algorithm 2)."""
    return churned(heun, model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """`samplers.dpm_2` with churn."""
    return churned(dpm_2, model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


@torch.no_grad()
def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """`samplers.euler_ancestral`."""
    plan = plan_of(euler_ancestral, levels_of(sigmas), eta=eta, noise=s_noise)
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, default_noise_sampler)


@torch.no_grad()
def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """`samplers.dpm_2_ancestral`; as in k-diffusion no noise in a step whose sigma_down is 0 (an eta well above 1)."""
    plan = plan_of(dpm_2_ancestral, levels_of(sigmas), eta=eta, noise=s_noise)
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, default_noise_sampler)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """`samplers.dpmpp_2s_ancestral`."""
    plan = plan_of(dpmpp_2s_ancestral, levels_of(sigmas), eta=eta, noise=s_noise)
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, default_noise_sampler)


@torch.no_grad()
def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """`samplers.lms`, orders 1 to 5: the integrals are exact where k-diffusion's are by quadrature."""
    plan = plan_of(lms, levels_of(sigmas), order=order)
    return noised(plan, model, x, sigmas, extra_args, callback, disable)


@torch.no_grad()
def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """`samplers.dpmpp_2m`."""
    return noised(plan_of(dpmpp_2m, levels_of(sigmas)), model, x, sigmas, extra_args, callback, disable)


@torch.no_grad()
def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """`samplers.dpmpp_sde`, with k-diffusion's ancestral form of eta, which is another one between 0 and 1."""
    levels = levels_of(sigmas)
    plan = sde_plan(levels, float(eta), float(s_noise), float(r))
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler, brownian_over(levels))


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """`samplers.dpmpp_2m_sde`."""
    if solver_type not in {"heun", "midpoint"}:
        raise ValueError("solver_type must be 'heun' or 'midpoint'")
    levels = levels_of(sigmas)
    plan = plan_of(dpmpp_2m_sde, levels, eta=eta, noise=s_noise, solver=solver_type)
    default = brownian_over(levels) if eta else None
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler if eta else None, default)


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """`samplers.dpmpp_3m_sde` with ``compat=True``: k-diffusion's weight of the curvature."""
    levels = levels_of(sigmas)
    plan = plan_of(dpmpp_3m_sde, levels, eta=eta, noise=s_noise, compat=True)
    default = brownian_over(levels) if eta else None
    return noised(plan, model, x, sigmas, extra_args, callback, disable, noise_sampler if eta else None, default)


def log_likelihood(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """(ln p(x) in nats [B], {"fevals": model calls}) by `likelihood.log_likelihood`, prior N(0, sigma_max^2).

    One Rademacher probe, drawn as k-diffusion draws it. Each sample has steps of its own: with the same probe its value
    does not depend on the batch; rk45 in ln sigma, float64.
    """
    low, high = float(sigma_min), float(sigma_max)
    if not 0.0 < low < high < math.inf:
        raise ValueError(f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    extra = {} if extra_args is None else dict(extra_args)
    probe = torch.randint_like(x, 2) * 2 - 1
    ends: dict[str, Any] = {"t_data": low, "t_noise": high, "rtol": rtol, "atol": atol, "directions": [probe]}
    found = likelihood.log_likelihood(model, x, edm(low, high), "x0", **ends, **extra)
    nats: Tensor = found.nats.to(x.dtype)
    return nats, {"fevals": found.evaluations}
