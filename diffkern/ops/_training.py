"""Forward noising, and the loss with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Reduction
from diffkern.ops._common import (
    REDUCTIONS,
    active,
    as_dtype_of,
    below_autograd,
    check_on_device,
    differentiates,
    dot,
    empty_like,
    function,
    is_usual,
    native,
    once,
    one_device,
    refuse_batches,
    refuse_grad,
    refuse_tangents,
    refuse_twice,
    rows_of,
    scaled_gradient,
    stores_gradient,
    stores_wide,
    table_gradient,
    times,
    weighted_by,
    widened,
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
    Differentiable in x0, noise and table.
    """
    try:
        check_on_device("noising", index, table)
        refuse_tangents("noising", x0, noise, table)
        seeds = numbered(seeds, x0)
        args = (x0, table, index, seeds, stream, noise, want_target, want_eps)
        if active() or differentiates(x0, table, noise):
            op = _Noising.apply if active() else native.noising
            return op(*args)
        with below_autograd():
            return native.noising(*args)
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
    refuse_grad("noising_out", x0, noise, table, out, target, eps)
    refuse_batches("noising_out", x0, noise, out)
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
    x0, table, index, seeds, ctx.stream, noise, *_ = inputs
    by_table = ctx.needs_input_grad[1]
    ctx.save_for_backward(table, index, *((x0, seeds, noise) if by_table else (None, None, None)))
    ctx.shape, ctx.has_noise = x0.shape, noise is not None


def _noising_backward(ctx: Any, g_x: Tensor, g_target: Tensor | None, g_eps: Tensor | None) -> tuple[Any, ...]:
    table, index, x0, seeds, noise = ctx.saved_tensors
    s, n, u, v = rows_of(table, index, len(ctx.shape)).unbind(1)
    g_x0 = as_dtype_of(times(s, g_x) + times(u, g_target), g_x)
    g_noise = g_table = None
    if ctx.has_noise:
        g_noise = as_dtype_of(times(n, g_x) + times(v, g_target) + (0.0 if g_eps is None else g_eps), g_x)
    if ctx.needs_input_grad[1]:
        eps = noise if noise is not None else _draw(x0, seeds, ctx.stream)
        g_table = table_gradient([dot(g, t) for g in (g_x, g_target) for t in (x0, eps)], table, index)
    return g_x0, g_table, None, None, None, g_noise, None, None


def _draw(x0: Tensor, seeds: Tensor, stream: int) -> Tensor:
    """eps by address as the kernels have it: float32 for 16-bit samples."""
    return native.randn(x0.shape, seeds, stream, torch.float64 if x0.dtype == torch.float64 else torch.float32)


torch.library.register_autograd("diffkern::noising", _noising_backward, setup_context=_noising_setup)
_Noising: Any = function(native.noising, _noising_setup, _noising_backward)


# ------------------------------------------------------------------------------------------------------- loss
_loss: Callable[..., tuple[Tensor, Tensor]] = native.loss.default


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
    reduction "none" the weight (lambda_t of lecture 002) and mean follow Ho et al. 2020, eq. 14. Differentiable once in
    pred, x0, noise and table. The gradient that comes in (a loss scale) is applied before the one rounding to a 16-bit
    pred: its backward pass makes the gradient anew, where that of a float32 pred hands out what forward stored.
    """
    try:
        if not isinstance(reduction, str) or reduction not in REDUCTIONS:
            raise ValueError(unknown("reduction", reduction, REDUCTIONS))
        check_on_device("loss", index, table)
        refuse_tangents("loss", pred, x0, noise, table)
        if seeds is not None and not isinstance(seeds, Tensor):
            seeds = numbered(seeds, x0)
        given = (x0, table, index, seeds, stream, noise, REDUCTIONS[reduction])
        if is_usual(pred, x0, table, noise) and (
            stores_gradient(pred, x0) or (stores_wide(pred) and x0.dtype != torch.float64)
        ):
            found: Tensor = _StoredLoss.apply(pred, given)
            return found
        pred = widened(pred)
        if active():
            return _Loss.apply(pred, *given, False)[0]
        want = torch.is_grad_enabled() and not table.requires_grad and stores_gradient(pred, x0)
        want = want and any(t is not None and t.requires_grad for t in (pred, x0, noise))
        return native.loss(pred, *given, want)[0]
    except Exception as error:
        explain("loss", loss, locals(), error)
        raise


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
    wide_grad: bool = False,
) -> tuple[Tensor, Tensor | None]:
    one_device("loss", x0=x0, pred=pred, table=table, index=index, seeds=seeds, noise=noise)
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    value = x0.new_empty([x0.shape[0]] if reduction == 0 else [], dtype=dtype)
    of_grad = torch.float32 if wide_grad and pred.dtype.itemsize < 4 else pred.dtype
    return value, empty_like(pred, of_grad) if want_grad else None


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    pred, x0, table, index, seeds, ctx.stream, noise, ctx.reduction, *_ = inputs
    grad = output[1]
    if grad is not None:
        ctx.mark_non_differentiable(grad)
    if grad is not None and not ctx.needs_input_grad[2]:
        ctx.save_for_backward(grad, None, None, table, index, None, None)
    else:
        ctx.save_for_backward(None, pred, x0, table, index, seeds, noise)
    ctx.dtypes = pred.dtype, x0.dtype, noise.dtype if noise is not None else None
    ctx.set_materialize_grads(False)  # else every backward makes zeros as large as pred, for `grad`


def _loss_backward(ctx: Any, g_value: Tensor | None, g_grad: None) -> tuple[Any, ...]:
    grad, pred, x0, table, index, seeds, noise = ctx.saved_tensors
    if g_value is None:
        return (None,) * 10
    _, by_x0, by_table, _, _, _, by_noise, *_ = ctx.needs_input_grad

    def make() -> tuple[Tensor | None, ...]:
        """The gradient of pred (wide where others are made of it, unrounded), and the mean squares."""
        if grad is not None:
            return scaled_gradient(grad, g_value), None
        rows, at = weighted_by(table, index, g_value, WEIGHT)
        given = pred.to(torch.promote_types(pred.dtype, g_value.dtype)) if by_x0 or by_table or by_noise else pred
        wide = native.loss(given, x0, rows, at, seeds, ctx.stream, noise, ctx.reduction, True)[1]
        if not by_table:
            return wide, None
        alone = torch.cat([table[:, :2], torch.ones_like(table[:, 2:])], 1)
        return wide, native.loss(pred, x0, alone, index, seeds, ctx.stream, noise, REDUCTIONS["none"], False)[0]

    wide, squares = once("loss", make, pred, x0, table, noise, g_value)
    assert wide is not None
    g_pred = wide.to(ctx.dtypes[0])
    g_x0 = g_table = g_noise = None
    if by_x0 or by_noise:
        u, v, _ = rows_of(table, index, wide.dim()).unbind(1)
        if by_x0:
            g_x0 = (-times(u, wide)).to(ctx.dtypes[1])  # type: ignore[union-attr]
        if by_noise:
            g_noise = (-times(v, wide)).to(ctx.dtypes[2])  # type: ignore[union-attr]
    if by_table:
        assert squares is not None
        by_weight = squares * g_value / (x0.shape[0] if ctx.reduction == REDUCTIONS["mean"] else 1)
        eps = noise if noise is not None else _draw(x0, seeds, ctx.stream)
        g_table = table_gradient([dot(-wide, x0), dot(-wide, eps), by_weight.double()], table, index)
    return g_pred, g_x0, g_table, None, None, None, g_noise, None, None, None


WEIGHT = slice(2, 3)
torch.library.register_autograd("diffkern::loss", _loss_backward, setup_context=_loss_setup)
_Loss: Any = function(native.loss, _loss_setup, _loss_backward)


class _StoredLoss(torch.autograd.Function):
    """The loss with the gradient of pred that its forward pass stores, as `is_usual` calls have it."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, given: tuple[Any, ...]) -> Tensor:
        with below_autograd():
            value, grad = _loss(pred, *given, True, True)
        ctx.save_for_backward(grad)
        ctx.dtype = pred.dtype
        ctx.set_materialize_grads(False)
        return value

    @staticmethod
    def backward(ctx: Any, g_value: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_twice("loss")
        (grad,) = ctx.saved_tensors
        if g_value is None:
            return None, None
        found = scaled_gradient(grad, g_value)
        return found if found.dtype is ctx.dtype else found.to(ctx.dtype), None
