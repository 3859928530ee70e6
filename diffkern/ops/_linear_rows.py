"""A linear layer whose rows do not know of each other: what is computed beforehand has the bits of what is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Activation
from diffkern.ops._common import (
    ACTIVATIONS,
    active,
    autocast,
    below_autograd,
    differentiates,
    function,
    native,
    one_device,
    refuse_tangents,
)
from diffkern.ops._explained import explained


@explained("linear_rows")
def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, act: Activation | None = None) -> Tensor:
    """act(x) weight^T + bias, each row with bits of its own: of many rows at once, or of one at a time.

        y[r, c] = bias[c] + sum_k act(x[r, k]) weight[c, k]     act(u) = u sigmoid(u), or u

    As torch.nn.functional.linear, whose sums depend on how many rows there are: what a run of a sampler knows
    beforehand, the embeddings of its times and their projections (DDPM, arXiv 2006.11239, appendix B; lecture 002), is
    computed for all of its steps in one product, and each step has the bits that it would have had alone. x
    [..., inputs], weight [outputs, inputs] and bias [outputs] of one floating-point dtype and any strides (rows whose
    elements are not neighbours are copied first); `act`: "silu", or None.

    y [..., outputs] has the dtype of x. Arithmetic is float32 (float64 for float64), in 16 lanes that take every 16th
    input each and are folded in one order, with one rounding at the store: the same bits for any number of rows, any
    thread count, instruction set and device. NaN propagates within its row. It reads weight once for 24 rows; torch's
    products are quicker for many, and for 16 bits where the processor multiplies those.

    Differentiable any number of times, backward by torch's products. Under autocast the inputs are cast as those of
    F.linear are. Raises RuntimeError for shapes and dtypes that do not fit; ValueError for an unknown `act`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(unknown("act", act, ["silu", "None"]))
    refuse_tangents("linear_rows", x, weight, bias)
    if x.dim() == 0:
        raise RuntimeError("diffkern.linear_rows: x must have shape [..., inputs], got a tensor without dimensions")
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        rows, weight, bias = autocast(rows), autocast(weight), None if bias is None else autocast(bias)
    args = rows, weight, bias, ACTIVATIONS[act]
    if active() or differentiates(rows, weight, bias):
        y: Tensor = (_LinearRows.apply if active() else native.linear_rows)(*args)
    else:
        with below_autograd():
            y = native.linear_rows(*args)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


@torch.library.register_fake("diffkern::linear_rows")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Tensor:
    one_device("linear_rows", x=x, weight=weight, bias=bias)
    return x.new_empty([x.shape[0], weight.shape[0]])


# ------------------------------------------------------------------------------------------------------- gradients
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.act = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By torch's products, in the dtype of x: differentiable themselves."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    g_x = grad @ weight if needs_x else None
    if g_x is not None and ctx.act:
        s = torch.sigmoid(x)
        g_x = g_x * (s * (1 + x * (1 - s)))
    g_weight = grad.t() @ (F.silu(x) if ctx.act else x) if needs_weight else None
    return g_x, g_weight, grad.sum(0) if ctx.biased and needs_bias else None, None


torch.library.register_autograd("diffkern::linear_rows", _backward, setup_context=_setup)
_LinearRows: Any = function(native.linear_rows, _setup, _backward)
