"""Attention: softmax(scale Q K^T) V on any strides, and on the [B, 3 C, ...] that the convolution before it gives."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.checks import unknown
from diffkern.integers import integer
from diffkern.names import HeadOrder
from diffkern.ops._common import (
    active,
    autocast,
    below_autograd,
    differentiates,
    function,
    native,
    once,
    one_device,
    refuse_onnx,
    refuse_tangents,
)
from diffkern.ops._explained import explain, explained

# Numbers as in csrc/bind/attention_views.h.
_ORDERS = {"new": 0, "legacy": 1, "edm": 2}
_STRIDED = torch.strided
_attention: Any = native.attention.default._op  # the overload itself calls it with what it was given


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor | None = None) -> Tensor:
    """softmax(scale Q K^T) V (Vaswani et al. 2017), nothing of size N x N in memory (Dao et al. 2022).

        S_ij = scale q_i . k_j,    out_i = sum_j exp(S_ij - lse_i) v_j,    lse_i = ln sum_j exp(S_ij)

    q [B, H, N, D], k and v [B, H, M, D], of one dtype; `scale` is D^-1/2 unless given. D: multiples of 8 up to 256, and
    512. Any strides where tokens (N) or channels (D) are contiguous, for each of q, k, v on its own: [B, H, N, D],
    a view of [B, N, H, D] or of [B, C, height, width] is read as it lies. The result has the axis order of q. Logits,
    softmax and sums are float32 whatever the dtype (float64 on the CPU for float64); NaN propagates. A sample's
    result depends neither on the others of the batch nor on threads. Differentiable once, deterministically; under
    autocast the inputs are cast as those of F.scaled_dot_product_attention are. A scale that requires grad (one number,
    as of cosine attention) multiplies q beforehand, and has its gradient from there.
    """
    try:
        # What most calls are: nothing but the op has to see it (the checks of `_checked` take longer than few queries).
        if not (
            scale is not None
            or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
            or torch.compiler.is_compiling()
            or torch._C._is_any_autocast_enabled()
            or active()
            or forward_ad._current_level >= 0
            or not q.layout is k.layout is v.layout is _STRIDED
        ):
            with below_autograd():
                return _attention(q, k, v, 1.0 / math.sqrt(q.size(-1) or 1))[0]
        return _checked(q, k, v, scale)
    except Exception as error:
        explain("attention", attention, locals(), error)
        raise


def _checked(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor | None) -> Tensor:
    """`attention` under autograd, autocast, transforms and traces."""
    if not q.layout == k.layout == v.layout == torch.strided:
        _check_strided("attention", q=q, k=k, v=v)
    refuse_tangents("attention", q, k, v, scale if isinstance(scale, Tensor) else None)
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        q, k, v = (autocast(t) for t in (q, k, v))
    if _is_learned(scale):
        q, scale = _times(q, scale), 1.0
    scale = _scale("attention", scale, q.shape[-1])
    if active() or differentiates(q, k, v):
        op = _Attention.apply if active() else native.attention
        found: Tensor = op(q, k, v, scale)[0]
        return found
    with below_autograd():
        found = native.attention(q, k, v, scale)[0]
    return found


@explained("spatial_attention")
def spatial_attention(
    qkv: Tensor, num_heads: int, order: HeadOrder = "new", scale: float | Tensor | None = None
) -> Tensor:
    """Self-attention over the positions of [B, 3 C, H, W], or [B, 3 C, N], or more dimensions: [B, C, H, W].

    `attention` on q, k and v as a 1 x 1 convolution wrote them, without moving them: contiguous or channels_last (the
    result has the same format). Where they stand among the 3 C channels, D = C / num_heads of each in a head:

        "new"     [q, k, v] of [heads] of [D]    guided-diffusion's QKVAttention (use_new_attention_order), DDPM,
                                                 k-diffusion; projections of q, k and v stacked
        "legacy"  [heads] of [q, k, v] of [D]    guided-diffusion's QKVAttentionLegacy, its default, and
                                                 improved-diffusion: OpenAI's checkpoints
        "edm"     [heads] of [D] of [q, k, v]    EDM (Karras et al. 2022); contiguous only, as channels_last leaves
                                                 no contiguous axis

    `scale` is D^-1/2 unless given, which is also what guided-diffusion's C^-1/4 on q and on k comes to. The gradient is
    written in place of q, k and v. Everything else as in `attention`.
    """
    if order not in _ORDERS:
        raise ValueError(unknown("order", order, _ORDERS))
    num_heads = integer("num_heads", num_heads, 1, 2**63 - 1, "of at least 1, below 2^63")
    _check_strided("spatial_attention", qkv=qkv)
    refuse_tangents("spatial_attention", qkv, scale if isinstance(scale, Tensor) else None)
    qkv = autocast(qkv)
    dim = qkv.shape[1] // (3 * num_heads) if qkv.dim() > 1 else 0
    if _is_learned(scale) and dim > 0 and qkv.shape[1] == 3 * num_heads * dim:
        qkv, scale = _times(qkv, _of_queries(qkv, num_heads, dim, order, scale)), 1.0
    scale = _scale("spatial_attention", scale, dim)
    if active() or differentiates(qkv):
        op = _SpatialAttention.apply if active() else native.spatial_attention
        return op(qkv, num_heads, _ORDERS[order], scale)[0]
    with below_autograd():
        return native.spatial_attention(qkv, num_heads, _ORDERS[order], scale)[0]


def _scale(op: str, scale: float | Tensor | None, dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(max(dim, 1))
    try:
        return float(scale)
    except (TypeError, ValueError, OverflowError):
        raise RuntimeError(f"diffkern.{op}: scale must be one number or None, got {scale!r:.80}") from None


def _is_learned(scale: float | Tensor | None) -> TypeGuard[Tensor]:
    if not isinstance(scale, Tensor) or not (active() or (scale.requires_grad and torch.is_grad_enabled())):
        return False
    if scale.numel() != 1:
        raise ValueError(f"scale must be one number, got shape {list(scale.shape)}")
    return True


def _times(x: Tensor, factor: Tensor) -> Tensor:
    """Their product in the dtype of x, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) * factor.to(x.device, wide)).to(x.dtype)


def _of_queries(qkv: Tensor, heads: int, dim: int, order: str, scale: Tensor) -> Tensor:
    """[3 C, 1, ...]: the scale in the channels of q, 1 in those of k and v."""
    axes, part = {"new": ((3, heads * dim), 0), "legacy": ((heads, 3, dim), 1), "edm": ((heads * dim, 3), 1)}[order]
    shape = [1] * len(axes)
    shape[part] = 3
    one = torch.ones_like(scale).reshape(1)
    factors = torch.cat([scale.reshape(1), one, one]).reshape(shape).expand(axes)
    return factors.reshape(-1, *(1,) * (qkv.dim() - 2))


def _check_strided(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.layout != torch.strided:
            raise RuntimeError(f"diffkern.{op}: {name} must be a dense (strided) tensor, got layout {t.layout}")


# ---------------------------------------------------------------------------------------------------- fake tensors
def _dense(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    """The fake of csrc/bind's new_dense: axes in this order in memory, without gaps."""
    strides, stride = [1] * len(sizes), 1
    for d in reversed(order):
        strides[d] = stride
        stride = stride * (sizes[d] if sizes[d] != 0 else 1)
    return torch.empty_strided(sizes, strides, dtype=x.dtype, device=x.device)


def _sums(x: Tensor, *sizes: int) -> Tensor:
    return x.new_empty(sizes, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _heads_like(x: Tensor) -> Tensor:
    """Dense in the axis order of [B, H, N, D]: the contiguous axis innermost, the others by descending stride; what
    strides cannot tell (size 1, stride 0, equal strides) in logical order. As csrc/bind's heads_order."""
    sizes, strides = x.shape, x.stride()
    token_inner = strides[3] != 1
    outer = [0, 1, 3 if token_inner else 2]
    for i in (1, 2):
        at = i
        for j in range(i - 1, -1, -1):
            a, b = outer[j], outer[at]
            if sizes[a] == 1 or sizes[b] == 1 or strides[a] == 0 or strides[b] == 0:
                continue
            if strides[a] > strides[b]:
                break
            if strides[a] < strides[b]:
                outer[j], outer[at] = b, a
                at = j
    return _dense(x, list(sizes), [*outer, 2 if token_inner else 3])


def _spatial_like(x: Tensor, channels: int) -> Tensor:
    """[B, channels, ...] in the memory format of x: channels_last where its positions are not contiguous."""
    sizes = [x.shape[0], channels, *x.shape[2:]]
    positions = list(range(2, x.dim()))
    inner = [d for d in positions if x.shape[d] != 1]
    last = bool(inner) and x.stride(inner[-1]) != 1
    return _dense(x, sizes, [0, *positions, 1] if last else [0, 1, *positions])


@torch.library.register_fake("diffkern::attention")
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    refuse_onnx("attention")
    one_device("attention", q=q, k=k, v=v)
    return _heads_like(q), _sums(q, *q.shape[:3])


@torch.library.register_fake("diffkern::attention_grad")
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    one_device("attention_grad", q=q, k=k, v=v, grad_out=grad_out, out=out, lse=lse)
    return _heads_like(q), _heads_like(k), _heads_like(v)


@torch.library.register_fake("diffkern::spatial_attention")
def _(qkv: Tensor, heads: int, order: int, scale: float) -> tuple[Tensor, Tensor]:
    refuse_onnx("spatial_attention")
    positions = 1
    for n in qkv.shape[2:]:
        positions = positions * n
    return _spatial_like(qkv, qkv.shape[1] // 3), _sums(qkv, qkv.shape[0], heads, positions)


@torch.library.register_fake("diffkern::spatial_attention_grad")
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, order: int, scale: float) -> Tensor:
    one_device("spatial_attention_grad", qkv=qkv, grad_out=grad_out, out=out, lse=lse)
    return _spatial_like(qkv, qkv.shape[1])


# ------------------------------------------------------------------------------------------------------- gradients
def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 4
    given = grad_out, *ctx.saved_tensors
    return (*once("attention", lambda: native.attention_grad(*given, ctx.scale), *given), None)


def _spatial_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _spatial_backward(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 4
    given = grad_out, *ctx.saved_tensors
    made = once("spatial_attention", lambda: (native.spatial_attention_grad(*given, *ctx.numbers),), *given)
    return made[0], None, None, None


torch.library.register_autograd("diffkern::attention", _attention_backward, setup_context=_attention_setup)
torch.library.register_autograd("diffkern::spatial_attention", _spatial_backward, setup_context=_spatial_setup)
_Attention: Any = function(native.attention, _attention_setup, _attention_backward)
_SpatialAttention: Any = function(native.spatial_attention, _spatial_setup, _spatial_backward)
