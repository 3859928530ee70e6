"""Forward noising, and the loss with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Reduction
from diffkern.ops._common import (
    REDUCTIONS,
    as_dtype_of,
    check_on_device,
    empty_like,
    native,
    one_device,
    refuse_grad,
    refuse_tangents,
    rows_of,
    scaled_gradient,
    times,
    wrote,
)
from diffkern.ops._explained import explain, explained
from diffkern.ops._seeds import Seeds, numbered


# ---------------------------------------------------------------------------------------------------- noising
def noising(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Seeds | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    want_target: bool = False,
    want_eps: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Forward noising and the training target in one pass (Ho et al. 2020, arXiv 2006.11239; lectures 000, 001, 002).

        x_t = s x0 + n eps,    target = u x0 + v eps

    `table` float64 [rows, 4] holds (s, n, u, v), `index` (int [B] or []) picks the row of each sample; without it the
    table has one row for all samples or one row a sample. eps is noise by address (`seeds`, `stream`) or the tensor
    `noise` (dtype of x0). Returns (x_t, target or None, eps or None), all in the dtype and memory format of x0.
    Differentiable in x0 and noise.
    """
    try:
        check_on_device("noising", index, table)
        refuse_tangents("noising", x0, noise)
        seeds = numbered(seeds, x0)
        return native.noising(x0, table, index, seeds, stream, noise, want_target, want_eps)
    except Exception as error:
        explain("noising", noising, locals(), error)
        raise


@explained("noising_out")
def noising_out(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    out: Tensor,
    target: Tensor | None = None,
    eps: Tensor | None = None,
    seeds: Seeds | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """`noising` into given tensors; `out` may be x0 or noise itself, in place. Not differentiable."""
    check_on_device("noising", index, table)
    refuse_grad("noising_out", x0, noise, out, target, eps)
    seeds = numbered(seeds, x0)
    native.noising_out(x0, table, index, seeds, stream, noise, out, target, eps)
    wrote(out, target, eps)
    return out


@torch.library.register_fake("diffkern::noising")
def _(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    want_target: bool,
    want_eps: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    one_device("noising", x0=x0, table=table, index=index, seeds=seeds, noise=noise)
    return empty_like(x0), empty_like(x0) if want_target else None, empty_like(x0) if want_eps else None


@torch.library.register_fake("diffkern::noising_out")
def _(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None,
    seeds: Tensor | None,
    stream: int,
    noise: Tensor | None,
    out: Tensor,
    target: Tensor | None,
    eps: Tensor | None,
) -> None:
    one_device("noising", x0=x0, table=table, index=index, seeds=seeds, noise=noise, out=out, target=target, eps=eps)


def _noising_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x0, table, index, _, _, noise, *_ = inputs
    ctx.save_for_backward(table, index)
    ctx.shape, ctx.has_noise = x0.shape, noise is not None


def _noising_backward(ctx: Any, g_x: Tensor, g_target: Tensor | None, g_eps: Tensor | None) -> tuple[Any, ...]:
    table, index = ctx.saved_tensors
    s, n, u, v = rows_of(table, index, len(ctx.shape)).unbind(1)
    g_x0 = as_dtype_of(times(s, g_x) + times(u, g_target), g_x)
    g_noise = None
    if ctx.has_noise:
        g_noise = as_dtype_of(times(n, g_x) + times(v, g_target) + (0.0 if g_eps is None else g_eps), g_x)
    return g_x0, None, None, None, None, g_noise, None, None


torch.library.register_autograd("diffkern::noising", _noising_backward, setup_context=_noising_setup)


# ------------------------------------------------------------------------------------------------------- loss
@explained("loss")
def loss(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Seeds | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Weighted squared error against a target that is never stored; its gradient is made in the same pass.

        L_b = weight_b mean_i (pred_i - (u x0_i + v eps_i))^2

    `table` float64 [rows, 3] holds (u, v, weight); index, seeds, stream and noise as in `noising`: the same address
    gives the same eps. `reduction`: "none" [B], "mean" or "sum" over the batch. The value is float32 (float64 for
    float64 x0) and has the same bits for any thread count; L_b does not depend on the other samples. With
    reduction "none" the weight (lambda_t of lecture 002) and mean follow Ho et al. 2020, eq. 14.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(unknown("reduction", reduction, REDUCTIONS))
    check_on_device("loss", index, table)
    refuse_tangents("loss", pred, x0, noise)
    differentiable = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (pred, x0, noise))
    seeds = numbered(seeds, x0)
    return native.loss(pred, x0, table, index, seeds, stream, noise, REDUCTIONS[reduction], differentiable)[0]


@torch.library.register_fake("diffkern::loss")
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
) -> tuple[Tensor, Tensor | None]:
    one_device("loss", x0=x0, pred=pred, table=table, index=index, seeds=seeds, noise=noise)
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    value = x0.new_empty([x0.shape[0]] if reduction == 0 else [], dtype=dtype)
    return value, empty_like(pred) if want_grad else None


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, x0, table, index, _, _, noise, *_ = inputs
    grad = output[1]
    ctx.save_for_backward(grad, table, index)
    ctx.dtypes = x0.dtype, noise.dtype if noise is not None else None
    if grad is not None:
        ctx.mark_non_differentiable(grad)
    ctx.set_materialize_grads(False)  # else every backward makes zeros as large as pred, for `grad`


def _loss_backward(ctx: Any, g_value: Tensor | None, g_grad: None) -> tuple[Any, ...]:
    grad, table, index = ctx.saved_tensors
    if g_value is None:
        return (None,) * 9
    if grad is None:
        raise RuntimeError("diffkern.loss: want_grad must be true where a gradient is asked for")
    if torch.is_grad_enabled():  # create_graph: the stored gradient would pass for a constant
        raise RuntimeError(
            "diffkern.loss: differentiable once only, use diffkern.reference.loss for higher derivatives"
        )
    g_pred = scaled_gradient(grad, g_value)
    g_x0 = g_noise = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[6]:
        u, v, _ = rows_of(table, index, grad.dim()).unbind(1)
        if ctx.needs_input_grad[1]:
            g_x0 = (-times(u, g_pred)).to(ctx.dtypes[0])  # type: ignore[union-attr]
        if ctx.needs_input_grad[6]:
            g_noise = (-times(v, g_pred)).to(ctx.dtypes[1])  # type: ignore[union-attr]
    return g_pred, g_x0, None, None, None, None, g_noise, None, None


torch.library.register_autograd("diffkern::loss", _loss_backward, setup_context=_loss_setup)
