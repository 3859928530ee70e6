"""Likelihoods by the probability-flow ODE (arXiv 2011.13456, section 4.3 and appendix D) with score_sde's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.score_sde import _ode
from diffkern.compat.score_sde.models import from_flattened_numpy, get_score_fn, to_flattened_numpy
from diffkern.names import OdeSolver
from diffkern.simulate.likelihood import log_likelihood, nats_to_bits_per_dim

__all__ = ["get_div_fn", "get_likelihood_fn"]


def get_div_fn(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``div_fn(x, t, eps)``: eps . (d fn/dx) eps, [B], whose mean over eps of unit covariance is the divergence."""

    def div_fn(x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((fn(at, t) * eps).sum(), at)
        return (gradient * eps).flatten(1).sum(1)

    return div_fn


def get_likelihood_fn(
    sde: Any,
    inverse_scaler: Callable[[Any], Any],
    hutchinson_type: str = "Rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-5,
    solver: OdeSolver = "device",
) -> Callable[[Any, Tensor], tuple[Tensor, Tensor, int]]:
    """``likelihood_fn(model, data) -> (bits a dimension [B], latent [B, ...], network calls)``.

    One probe eps of ``hutchinson_type``, "Rademacher" or "Gaussian", drawn from torch's generator. The bits are those
    of 8-bit images: -ln p/(D ln 2) + 7 - inverse_scaler(-1). ``solver`` "device": `diffkern.log_likelihood`, steps of
    its own for each sample, so that a value does not depend on the batch; "scipy" as in `sampling.get_ode_sampler`.
    """
    _ode.check_solver(solver)

    @torch.no_grad()
    def likelihood_fn(model: Any, data: Tensor) -> tuple[Tensor, Tensor, int]:
        if hutchinson_type == "Gaussian":
            probe = torch.randn_like(data)
        elif hutchinson_type == "Rademacher":
            probe = torch.randint_like(data, low=0, high=2).float() * 2 - 1.0
        else:
            raise NotImplementedError(f"Hutchinson type {hutchinson_type} unknown.")
        data = _ode.widened(data)
        score_fn = get_score_fn(sde, model, train=False, continuous=True)
        if _ode.on_schedule(sde, method, solver):
            found = log_likelihood(
                score_fn.network,
                data,
                sde.schedule,
                "score" if score_fn.exploding else "eps",
                rtol=rtol,
                atol=atol,
                directions=[probe],
                t_data=eps,
                t_noise=sde.T,
                prior=sde.prior_logp,
            )
            nats, latent, calls = found
            # score_sde's probe is in the divergence of the linear drift, too: D f becomes |probe|^2 f.
            ends = sde.schedule.alpha(torch.tensor([eps, float(sde.T)])).log().tolist()
            excess = probe.double().square().flatten(1).sum(1) - data[0].numel()
            nats = nats + excess * (ends[1] - ends[0])
        else:
            nats, latent, calls = _scipy(sde, score_fn, data, probe, (eps, sde.T), rtol, atol, method)
        bits = nats_to_bits_per_dim(nats, data[0].numel()) - inverse_scaler(-1.0)
        return bits.to(data.dtype), latent.to(data.dtype), calls

    return likelihood_fn


def _scipy(
    sde: Any,
    score_fn: Any,
    data: Tensor,
    probe: Tensor,
    span: tuple[float, float],
    rtol: float,
    atol: float,
    method: str,
) -> tuple[Tensor, Tensor, int]:
    """State and integral as one vector on the host, as score_sde has them."""
    rsde = sde.reverse(score_fn, probability_flow=True)
    batch = len(data)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        slope: Tensor = rsde.sde(x, t)[0]
        return slope

    divergence = get_div_fn(drift)

    def slope(t: float, flat: np.ndarray) -> np.ndarray:
        x = from_flattened_numpy(flat[:-batch], data.shape).to(data.device, data.dtype)
        at = x.new_full([batch], t)
        return np.concatenate([to_flattened_numpy(drift(x, at)), to_flattened_numpy(divergence(x, at, probe))])

    start = np.concatenate([to_flattened_numpy(data), np.zeros(batch)])
    end, calls = _ode.solve_ivp(slope, span, start, rtol, atol, method)
    latent = from_flattened_numpy(end[:-batch], data.shape).to(data.device)
    change = torch.from_numpy(end[-batch:].copy()).to(data.device)
    return sde.prior_logp(latent) + change, latent, calls
