"""Adaptive layer normalisation and the GELU of vision transformers, each with the linear layer after it.

What a linear layer reads is kept for its gradient, and is most of what the training of a transformer keeps. Both
functions keep what it is made of instead, which is kept anyway or is smaller, and make it again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffkern.modes import real
from diffkern.nn.plain import is_plain

__all__ = ["adaptive_linear", "adaptive_norm", "gelu", "gelu_linear"]

# gelu(u) = u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))) = u sigmoid(u (A + B u^2))
_A = 2.0 * (2.0 / torch.pi) ** 0.5
_B = 0.044715 * _A
_CHUNK = 1 << 17  # numbers of a thread that stay near it as float32


def adaptive_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """(1 + scale) x_hat + shift, x_hat = (x - mean) / sqrt(var + eps) over the channels: [B, N, C], scale and shift
    [B, C], to [B, N, C].

    The adaptive layer norm of Peebles & Xie 2023 (arXiv 2212.09748). Any floating-point dtype, mean and variance as
    `F.layer_norm` makes them; NaN stays in its token.
    """
    normed, factor = F.layer_norm(x, x.shape[-1:], eps=eps), 1.0 + scale[:, None]
    same = normed.dtype == scale.dtype == shift.dtype
    if same and _eager(normed, scale, shift) and not _differentiates(normed, scale, shift):
        return torch.addcmul(shift[:, None], normed, factor, out=normed)
    return torch.addcmul(shift[:, None], normed, factor)


def gelu(u: Tensor) -> Tensor:
    """u/2 (1 + tanh(sqrt(2/pi) (u + 0.044715 u^3))): the GELU of Hendrycks & Gimpel 2016 by its tanh.

    As `F.gelu(u, approximate="tanh")`. On the CPU without a gradient u sigmoid(...), the same number, which takes half
    of the time and keeps the digits of u far below 0; of 16-bit types in float32, rounded once.
    """
    if u.device.type != "cpu" or not _eager(u) or _differentiates(u):
        return F.gelu(u, approximate="tanh")
    if _by_sigmoid(u):
        return _argument(u).sigmoid_().mul_(u)
    made = torch.empty(u.shape, dtype=u.dtype)
    count = _CHUNK * torch.get_num_threads()
    for part, out in zip(u.reshape(-1).split(count), made.view(-1).split(count), strict=True):
        wide = part.float()
        out.copy_(_argument(wide).sigmoid_().mul_(wide))
    return made


def adaptive_linear(x: Tensor, scale: Tensor, shift: Tensor, linear: nn.Module, eps: float = 1e-6) -> Tensor:
    """``linear(adaptive_norm(x, scale, shift, eps))``, of whose input the gradient keeps x and its statistics alone."""
    if _lean(linear, x, scale, shift):
        made: Tensor = _AdaptiveLinear.apply(x, scale, shift, linear.weight, linear.bias, eps)
        return made
    found: Tensor = linear(adaptive_norm(x, scale, shift, eps))
    return found


def gelu_linear(u: Tensor, linear: nn.Module, dropout: nn.Module | None = None) -> Tensor:
    """``linear(dropout(gelu(u)))``, of whose input the gradient keeps u alone where nothing is dropped."""
    if dropout is not None and dropout.training and getattr(dropout, "p", 1.0) > 0.0:
        found: Tensor = linear(dropout(gelu(u)))
        return found
    if _lean(linear, u):
        made: Tensor = _GeluLinear.apply(u, linear.weight, linear.bias)
        return made
    found = linear(gelu(u))
    return found


def _eager(*tensors: Tensor) -> bool:
    """Real tensors, outside of graphs, transforms and forward gradients."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return forward_ad._current_level < 0 and all(map(real, tensors))


def _lean(linear: Any, x: Tensor, *others: Tensor) -> bool:
    """Whether a gradient is to come, in one dtype, through a linear layer that is nothing but one."""
    if x.is_meta or not is_plain(linear, nn.Linear):
        return False
    tensors = [x, *others, linear.weight, *(() if linear.bias is None else (linear.bias,))]
    if any(t.dtype != x.dtype for t in tensors) or torch.is_autocast_enabled(x.device.type):
        return False
    return _eager(*tensors) and _differentiates(*tensors)


def _differentiates(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _by_sigmoid(u: Tensor) -> bool:
    """Whether several passes are faster than torch's one, and lose nothing between them."""
    return u.device.type == "cpu" and u.dtype in (torch.float32, torch.float64)


def _argument(u: Tensor) -> Tensor:
    """u (A + B u^2), of whose sigmoid the GELU is made."""
    return torch.addcmul(u.new_full((), _A), u, u, value=_B).mul_(u)


def _with_slope(u: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(u) and its derivative: s + s (1 - s) (A u + 3 B u^3) for s = sigmoid(v), v = u (A + B u^2)."""
    v = _argument(u)
    s = v.sigmoid()
    v.add_(u, alpha=-2.0 / 3.0 * _A)  # a third of A u + 3 B u^3
    slope = torch.addcmul(s, s, s, value=-1.0)
    torch.addcmul(s, slope, v, value=3.0, out=slope)
    return s.mul_(u), slope


def _linear_grads(grad: Tensor, given: Tensor, needed: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Of weight and bias, as far as they are needed, by what the linear layer was given."""
    rows = grad.flatten(0, -2)
    return rows.t() @ given.flatten(0, -2) if needed[0] else None, rows.sum(0) if needed[1] else None


def _by_autograd(
    function: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs that are needed, which may be differentiated again."""
    with torch.enable_grad():
        # Aliases: an input may have been made of another, by a graph that is not this function's.
        inputs = [x.view_as(x) if isinstance(x, Tensor) else x for x in inputs]
        out = function(*inputs)
    asked = [x for x, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(out, asked, grad, create_graph=True))
    return tuple(next(found) if needs else None for needs in needed)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(u, weight, bias)
        return F.linear(gelu(u), weight, bias)

    @staticmethod
    def plain(u: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(F.gelu(u, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _by_autograd(_GeluLinear.plain, ctx.saved_tensors, needed, grad)
        if not _by_sigmoid(u):
            g_u = torch.ops.aten.gelu_backward(grad @ weight, u, approximate="tanh") if needed[0] else None
            return g_u, *_linear_grads(grad, gelu(u), needed[1:])
        made, slope = _with_slope(u)
        found = _linear_grads(grad, made, needed[1:])
        return (grad @ weight).mul_(slope) if needed[0] else None, *found


class _AdaptiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(x, scale, shift, weight, bias, mean, rstd)
        ctx.eps = eps
        return F.linear(torch.addcmul(shift[:, None], normed, 1.0 + scale[:, None], out=normed), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mean, rstd = ctx.saved_tensors
        x, scale, shift, weight, _ = inputs
        needed = ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():

            def plain(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                return F.linear(adaptive_norm(x, scale, shift, ctx.eps), weight, bias)

            return *_by_autograd(plain, inputs, needed, grad), None
        channels, factor = x.shape[-1:], 1.0 + scale[:, None]
        normed = torch.native_layer_norm(x, channels, None, None, ctx.eps)[0]
        g_given = grad @ weight  # of what the linear layer was given
        g_scale = (g_given * normed).sum(1) if needed[1] else None
        g_shift = g_given.sum(1) if needed[2] else None
        given = torch.addcmul(shift[:, None], normed, factor, out=normed)
        g_linear = _linear_grads(grad, given, needed[3:])
        g_x = None
        if needed[0]:
            g_x = torch.ops.aten.native_layer_norm_backward(
                g_given.mul_(factor), x, channels, mean, rstd, None, None, [True, False, False]
            )[0]
        return g_x, g_scale, g_shift, *g_linear, None
