"""Group normalisation, the modulation of each sample and SiLU in one op, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.integers import integer
from diffkern.names import Activation
from diffkern.ops._common import (
    ACTIVATIONS,
    active,
    below_autograd,
    differentiates,
    empty_like,
    function,
    is_packed,
    native,
    once,
    one_device,
    refuse_onnx,
    refuse_tangents,
)
from diffkern.ops._explained import explained


@explained("group_norm_act")
def group_norm_act(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    eps: float = 1e-5,
    act: Activation | None = "silu",
) -> Tensor:
    """Group normalisation, modulated and activated, in one op: the blocks of diffusion UNets.

        x_hat = (x + add - mean_g) / sqrt(var_g + eps)           over each (sample, group), biased variance
        y     = act((x_hat weight + bias) (1 + scale) + shift)   act(u) = u sigmoid(u), or u

    Wu & He 2018 (arXiv 1803.08494), as torch.nn.functional.group_norm; scale and shift a sample are the adaptive group
    norm of Dhariwal & Nichol 2021 (arXiv 2105.05233), `add` is the time embedding of Ho et al. 2020 (arXiv 2006.11239)
    on its way into the second norm of a block; mean_g and var_g are those of x + add. x [B, C, ...] of any rank,
    contiguous or channels_last (other strides are copied first); `groups` divides C; `weight` and `bias` [C], `scale`,
    `shift` and `add` [B, C], each absent or of any floating-point dtype and strides (the halves of one linear layer,
    say). `act`: "silu", or None.

    y has dtype and memory format of x. Arithmetic is float32 (float64 for float64) with one rounding at the store;
    mean and variance are made in one read of x from memory, of blocks whose own mean is taken off, merged in float64,
    so that a mean far from 0 costs no digits. The order of the sums is fixed: y has the same bits for any thread count,
    and a sample's do not depend on the others. NaN propagates within its group.

    Differentiable once in x, weight, bias, scale, shift and add, deterministically. Backward keeps x, and mean and rstd
    [B, groups], and makes everything between x and y again. Raises RuntimeError for groups that do not divide C, for
    samples without elements, and for parameters of other shapes; ValueError for an unknown `act`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(unknown("act", act, ["silu", "None"]))
    groups = integer("groups", groups, 1, 2**63 - 1, "of at least 1, below 2^63")
    tensors = x, weight, bias, scale, shift, add
    refuse_tangents("group_norm_act", *tensors)
    args = x, groups, weight, bias, scale, shift, add, float(eps), ACTIVATIONS[act]
    if active() or differentiates(*tensors):
        op = _GroupNormAct.apply if active() else native.group_norm_act
        return op(*args)[0]
    with below_autograd():
        return native.group_norm_act(*args)[0]


# ---------------------------------------------------------------------------------------------------- fake tensors
def _like(x: Tensor) -> Tensor:
    """The fake of what csrc/bind makes: the format of x as the kernels read it."""
    inner = 1
    for n in x.shape[1:]:
        inner = inner * n
    last = is_packed(x, True) and (x.shape[0] <= 1 or x.stride(0) == inner)
    return empty_like(x) if is_packed(x, False) or last else torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("diffkern::group_norm_act")
def _(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    eps: float,
    act: int,
) -> tuple[Tensor, Tensor, Tensor]:
    refuse_onnx("group_norm_act")
    one_device("group_norm_act", x=x, weight=weight, bias=bias, scale=scale, shift=shift, add=add)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = (x.new_empty([x.shape[0], groups], dtype=wide) for _ in range(2))
    return _like(x), mean, rstd


@torch.library.register_fake("diffkern::group_norm_act_grad")
def _(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    add: Tensor | None,
    act: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    one_device("group_norm_act", x=x, grad_out=grad_out, weight=weight, bias=bias, scale=scale, shift=shift, add=add)
    made = (None if t is None else t.new_empty(t.shape) for t in (weight, bias, scale, shift, add))
    return _like(x), *made  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- gradients
def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, scale, shift, add, _, ctx.act = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, scale, shift, add)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no more
    x, mean, rstd, *parameters = saved

    def make() -> tuple[Tensor | None, ...]:
        made: tuple[Tensor | None, ...] = native.group_norm_act_grad(
            grad_out, x, mean, rstd, ctx.groups, *parameters, ctx.act
        )
        return made

    g_x, *g_parameters = once("group_norm_act", make, grad_out, *saved)
    return g_x, None, *g_parameters, None, None


torch.library.register_autograd("diffkern::group_norm_act", _backward, setup_context=_setup)
_GroupNormAct: Any = function(native.group_norm_act, _setup, _backward)
