"""Training losses of arXiv 2011.13456 (eq. 7, 1 and 3; appendices B and C) with score_sde's interface.

Noising is one fused op, the loss with its gradient another. The draws are score_sde's: t, then z (labels, then z).

| loss | a sample's value, mean or 1/2 sum over its elements |
|---|---|
| continuous | (std score + z)^2 |
| with likelihood weighting (arXiv 2101.09258) | g^2 (score + z/std)^2 |
| SMLD | sigma_i^2 (score + z/sigma_i)^2 |
| DDPM | (m - z)^2 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.kit.rows import check_room, promote
from diffkern.compat.score_sde import _rows
from diffkern.compat.score_sde.models import get_model_fn, get_score_fn
from diffkern.compat.score_sde.sde_lib import VESDE, VPSDE
from diffkern.modes import neutral

__all__ = [
    "get_ddpm_loss_fn",
    "get_optimizer",
    "get_sde_loss_fn",
    "get_smld_loss_fn",
    "get_step_fn",
    "optimization_manager",
]

Loss = Callable[[Any, Tensor], Tensor]


def get_optimizer(config: Any, params: Any) -> torch.optim.Optimizer:
    """Adam with ``config.optim``'s lr, beta1, eps and weight_decay; NotImplementedError for another optimizer."""
    chosen = config.optim
    if chosen.optimizer != "Adam":
        raise NotImplementedError(f"Optimizer {chosen.optimizer} not supported yet!")
    return torch.optim.Adam(
        params, lr=chosen.lr, betas=(chosen.beta1, 0.999), eps=chosen.eps, weight_decay=chosen.weight_decay
    )


def optimization_manager(config: Any) -> Callable[..., None]:
    """``optimize_fn(optimizer, params, step)``: linear warm-up of the learning rate, clipped gradients, one step.

    ``config.optim``: lr, warmup (steps; 0: none), grad_clip (largest norm; negative: none).
    """

    def optimize_fn(
        optimizer: torch.optim.Optimizer,
        params: Any,
        step: int,
        lr: float = config.optim.lr,
        warmup: int = config.optim.warmup,
        grad_clip: float = config.optim.grad_clip,
    ) -> None:
        if warmup > 0:
            for group in optimizer.param_groups:
                group["lr"] = lr * min(step / warmup, 1.0)
        if grad_clip >= 0:
            torch.nn.utils.clip_grad_norm_(params, max_norm=grad_clip)
        optimizer.step()

    return optimize_fn


def get_sde_loss_fn(
    sde: Any,
    train: bool,
    reduce_mean: bool = True,
    continuous: bool = True,
    likelihood_weighting: bool = True,
    eps: float = 1e-5,
) -> Loss:
    """``loss_fn(model, batch)``, 0-dim: the batch's mean of the continuous loss at t uniform in [eps, T]."""

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        score_fn = get_score_fn(sde, model, train=train, continuous=continuous)
        t = torch.rand(batch.shape[0], device=batch.device) * (sde.T - eps) + eps
        z = torch.randn_like(batch)
        if not all(_rows.linear(sde, method) for method in ("marginal_prob", "sde")):
            return _plain(sde, score_fn, batch, t, z, reduce_mean, likelihood_weighting)
        signal, std = (values.double() for values in _rows.rate(sde, "marginal_prob", t))
        check_room(promote(batch.dtype, t.dtype), sde, std)
        noised, z = _noised(batch, z, torch.stack([signal, std], 1), None, t.dtype)
        m, scale = score_fn.network(noised, t), score_fn.scale(t)
        # score + z/std = scale (m - v z), v = -1/(scale std): 1 for a network of eps whose std is the SDE's.
        factor = torch.ones_like(std) if scale is None else scale
        weight = _rows.rate(sde, "sde", t)[1].double() ** 2 if likelihood_weighting else std**2
        table = torch.stack([torch.zeros_like(std), -1.0 / (factor * std), weight * factor**2], 1)
        return _reduced(m, noised, z, table, None, reduce_mean)

    return loss_fn


def get_smld_loss_fn(vesde: Any, train: bool, reduce_mean: bool = False) -> Loss:
    """``loss_fn(model, batch)``, 0-dim: denoising score matching at random levels of SMLD, label 0 the highest."""
    if not isinstance(vesde, VESDE):
        raise AssertionError("SMLD training only works for VESDEs.")
    sigma = torch.flip(vesde.discrete_sigmas, dims=(0,)).double()
    levels = torch.stack([torch.ones_like(sigma), sigma], 1)
    rows = torch.stack([torch.zeros_like(sigma), -1.0 / sigma, sigma**2], 1)
    return _discrete_loss(vesde.N, train, reduce_mean, levels, rows)


def get_ddpm_loss_fn(vpsde: Any, train: bool, reduce_mean: bool = True) -> Loss:
    """``loss_fn(model, batch)``, 0-dim: DDPM's loss of eps at random steps of its chain."""
    if not isinstance(vpsde, VPSDE):
        raise AssertionError("DDPM training only works for VPSDEs.")
    levels = torch.stack([vpsde.sqrt_alphas_cumprod, vpsde.sqrt_1m_alphas_cumprod], 1).double()
    return _discrete_loss(vpsde.N, train, reduce_mean, levels, torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64))


def _discrete_loss(N: int, train: bool, reduce_mean: bool, levels: Tensor, rows: Tensor) -> Loss:
    """Losses at labels 0..N-1, whose tables are copied to a device once."""
    with neutral():  # copies: what the SDE made may be of the mode that it was made in
        levels, rows = levels.clone(), rows.clone()
    placed: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def loss_fn(model: Any, batch: Tensor) -> Tensor:
        labels = torch.randint(0, N, (batch.shape[0],), device=batch.device)
        if batch.device not in placed:
            with neutral():
                placed[batch.device] = levels.to(batch.device), rows.to(batch.device)
        noising, table = placed[batch.device]
        noised, z = _noised(batch, torch.randn_like(batch), noising, labels, torch.float32)
        m = get_model_fn(model, train=train)(noised, labels)
        return _reduced(m, noised, z, table, labels if len(table) > 1 else None, reduce_mean)

    return loss_fn


def _noised(
    batch: Tensor, z: Tensor, levels: Tensor, labels: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(signal x0 + std z by one op, z), in the wider of the dtypes of batch and times."""
    wide = torch.promote_types(batch.dtype, dtype)
    z = z.to(wide)
    table = torch.nn.functional.pad(levels, (0, 2))
    return ops.noising(batch.to(wide), table, labels, noise=z)[0], z


def _reduced(m: Tensor, like: Tensor, z: Tensor, table: Tensor, labels: Tensor | None, reduce_mean: bool) -> Tensor:
    """The batch's mean of weight mean_i (m - v z)^2, or of 1/2 the sum; gradient in the same op."""
    if not reduce_mean:
        table = torch.cat([table[:, :2], table[:, 2:] * (0.5 * like[0].numel())], 1)
    return ops.loss(m, like, table, labels, noise=z)


def _plain(
    sde: Any, score_fn: Any, batch: Tensor, t: Tensor, z: Tensor, reduce_mean: bool, likelihood_weighting: bool
) -> Tensor:
    """The continuous loss for an SDE of any form, in plain torch."""
    mean, std = sde.marginal_prob(batch, t)
    wide = _rows.column(std, batch)
    score = score_fn(mean + wide * z, t)
    errors = (score + z / wide if likelihood_weighting else score * wide + z).square().flatten(1)
    values = errors.mean(1) if reduce_mean else 0.5 * errors.sum(1)
    if likelihood_weighting:
        values = values * sde.sde(torch.zeros_like(batch), t)[1] ** 2
    return values.mean()


def get_step_fn(
    sde: Any,
    train: bool,
    optimize_fn: Callable[..., None] | None = None,
    reduce_mean: bool = False,
    continuous: bool = True,
    likelihood_weighting: bool = False,
) -> Callable[[Mapping[str, Any], Tensor], Tensor]:
    """``step_fn(state, batch)``: a training step, or in evaluation the loss with the averaged weights; the loss.

    ``state``: a dict of model, optimizer, ema (update, store, copy_to, restore of parameters) and step, counted on.
    """
    if continuous:
        loss_fn = get_sde_loss_fn(
            sde, train, reduce_mean=reduce_mean, continuous=True, likelihood_weighting=likelihood_weighting
        )
    elif likelihood_weighting:
        raise AssertionError("Likelihood weighting is not supported for original SMLD/DDPM training.")
    elif isinstance(sde, VESDE):
        loss_fn = get_smld_loss_fn(sde, train, reduce_mean=reduce_mean)
    elif isinstance(sde, VPSDE):
        loss_fn = get_ddpm_loss_fn(sde, train, reduce_mean=reduce_mean)
    else:
        raise ValueError(f"Discrete training for {type(sde).__name__} is not recommended.")
    if train and optimize_fn is None:
        raise ValueError("optimize_fn must be given for training, got None (optimization_manager makes one)")

    def step_fn(state: Any, batch: Tensor) -> Tensor:
        model, ema = state["model"], state["ema"]
        if train:
            assert optimize_fn is not None
            state["optimizer"].zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimize_fn(state["optimizer"], model.parameters(), step=state["step"])
            state["step"] += 1
            ema.update(model.parameters())
            return loss
        with torch.no_grad():
            ema.store(model.parameters())
            ema.copy_to(model.parameters())
            loss = loss_fn(model, batch)
            ema.restore(model.parameters())
        return loss

    return step_fn
