"""The variational bound of a reverse step with its gradient, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern._load import layout
from diffkern.checks import unknown
from diffkern.names import Reduction
from diffkern.ops._common import (
    REDUCTIONS,
    active,
    check_on_device,
    empty_like,
    function,
    native,
    once,
    one_device,
    refuse_tangents,
    scaled_gradient,
    stores_gradient,
    weighted_by,
    widened,
)
from diffkern.ops._explained import explained
from diffkern.ops._seeds import Seeds, numbered

VARIATIONAL_COLUMNS: tuple[str, ...] = layout()["columns"]["variational"]
"""The columns of the table of `variational`, in order: u, v, q, clip, k2, r0, r1, inv_std, bin, w_squares, w_bound,
w_mean."""
HALF_BIN = 1.0 / 255.0
"""Half a bin of 8-bit data scaled to [-1, 1], for the column ``bin``."""


@explained("variational")
def variational(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Seeds | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
) -> tuple[Tensor, Tensor]:
    """Squared error and variational bound of a network's mean and variance, and the gradient, in one pass.

        d     = m - (u x0 + v eps)                        error of the network in its own prediction
        e     = clamp(x0 + q d, -clip, clip) - x0         error of the x0 that follows
        r     = r0 + r1 w                                 ln of the model's variance over the posterior's
        bound = (exp(-r) - 1 + r + k2 e^2 exp(-r)) / 2    KL of the two Gaussians in nats, or where inv_std > 0
              = -ln P(bin of x0 | N(x0 + e, std^2))       1 / std = inv_std exp(-r / 2): the discretised decoder
        L_b   = w_squares mean_i d_i^2 + w_bound mean_i bound_i / ln 2

    pred is [B, 2C, ...] = (m, w) for a learned variance, or [B, C, ...] = m; x0 [B, C, ...]. `table` float64 [rows, 12]
    (columns: `VARIATIONAL_COLUMNS`); index, seeds, stream and noise as in `noising`: the same address gives the same
    eps. The bound's gradient reaches m times w_mean: 0 is the stopped gradient of the hybrid loss. Bins are
    [x0 - bin, x0 + bin], the outermost ones of [-1, 1] open. Returns (L reduced as in `loss`, [B, 2]: mean d^2 and
    mean bound in bits); only L is differentiable, in pred.

    Ho et al. 2020 (arXiv 2006.11239), eq. 5, 8 and 13; Nichol and Dhariwal 2021 (2102.09672); lectures 000, 001, 002.
    x_t drops out, as both means hold the same multiple of it. The normal distribution is exact to float32, where
    guided-diffusion's tanh formula is off by up to 2e-4 and stops at 1e-12.
    """
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduction, REDUCTIONS))
    check_on_device("variational", index, table)
    refuse_tangents("variational", pred, x0, noise)
    enabled = torch.is_grad_enabled()
    if enabled and (x0.requires_grad or table.requires_grad or (noise is not None and noise.requires_grad)):
        raise RuntimeError(
            "diffkern.variational: differentiable in pred only, and x0, noise or table requires grad: detach it, or "
            "use diffkern.reference.variational"
        )
    seeds = numbered(seeds, x0)
    pred = widened(pred)
    if active():
        given = (pred, x0, table, index, seeds, stream, noise, REDUCTIONS[reduction], False)
        value, means, _ = _Variational.apply(*given)
        return value, means
    wants = enabled and pred.requires_grad and stores_gradient(pred, x0)
    value, means, _ = native.variational(pred, x0, table, index, seeds, stream, noise, REDUCTIONS[reduction], wants)
    return value, means


@torch.library.register_fake("diffkern::variational")
def _(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    reduction: int,
    want_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    one_device("variational", x0=x0, pred=pred, table=table, index=index, seeds=seeds, noise=noise)
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    value = x0.new_empty([x0.shape[0]] if reduction == 0 else [], dtype=dtype)
    return value, x0.new_empty([x0.shape[0], 2], dtype=dtype), empty_like(pred) if want_grad else None


WEIGHTS = slice(VARIATIONAL_COLUMNS.index("w_squares"), VARIATIONAL_COLUMNS.index("w_bound") + 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    pred, x0, table, index, seeds, ctx.stream, noise, ctx.reduction, _ = inputs
    _, means, grad = output
    if grad is None:
        ctx.save_for_backward(None, pred, x0, table, index, seeds, noise)
    else:
        ctx.save_for_backward(grad, *(None,) * 6)
    ctx.mark_non_differentiable(*(t for t in (means, grad) if t is not None))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, g_value: Tensor | None, g_means: None, g_grad: None) -> tuple[Any, ...]:
    grad, pred, x0, table, index, seeds, noise = ctx.saved_tensors
    if g_value is None:
        return (None,) * 9

    def make() -> tuple[Tensor]:
        if grad is not None:
            return (scaled_gradient(grad, g_value),)
        rows, at = weighted_by(table, index, g_value, WEIGHTS)
        return (native.variational(pred, x0, rows, at, seeds, ctx.stream, noise, ctx.reduction, True)[2],)

    return once("variational", make, pred, x0, g_value)[0], *(None,) * 8


torch.library.register_autograd("diffkern::variational", _backward, setup_context=_setup)
_Variational: Any = function(native.variational, _setup, _backward)
