"""3 x 3 convolutions by Winograd's products on the CPU: fewer products than the definition has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern.checks import unknown
from diffkern.names import Precision
from diffkern.ops._common import (
    active,
    below_autograd,
    differentiates,
    function,
    native,
    one_device,
    refuse_grad,
    refuse_onnx,
    refuse_tangents,
)
from diffkern.ops._explained import explained

_FORMS: dict[Precision, int] = {"exact": 0, "fast": 1}
_UPSAMPLED = 2
_POINTS = {0: 16, 1: 36, _UPSAMPLED: 9}
_PANEL = 64


@explained("conv3x3")
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upsample: bool = False,
    precision: Precision = "exact",
    packed: Tensor | None = None,
) -> Tensor:
    """The convolution of 3 x 3 taps with stride 1 and padding 1, of float32 images on the CPU.

        y[b, k, i, j] = bias[k] + sum_{c, p, q} weight[k, c, p, q] x[b, c, i + p - 1, j + q - 1]

    x [B, C, H, W], weight [K, C, 3, 3], bias [K] or None; y [B, K, H, W] in channels_last. x whose channels are not
    neighbours, as in channels_last, is copied first. ``upsample``: of the image in which every pixel of x stands twice
    in both directions (nearest), y [B, K, 2 H, 2 W], without making it.

    By Winograd's products A^T [sum_c (G g G^T) * (B^T d B)] A (Lavin and Gray 2016, arXiv 1509.09308): "exact" is
    F(2, 3), 4 products for an output and channel, where the definition takes 9, with an error like that of torch's
    convolution in float32 (0.2 to 1.4 times it, by its kernel; twice for a single channel); "fast" is F(4, 3), 2.25
    products, with an error some eight times larger. Upsampled images take 2.25 with the error of "exact", whatever
    ``precision``, as of their 16 points 7 are differences of equal pixels. The bits of a sample depend neither on the
    batch nor on the number of threads, and are the same with AVX2 and AVX-512. A NaN or infinity spoils the outputs
    that read it, as NaN or an infinity ("fast": also outputs up to two pixels beyond those, of the same tile of 4 x 4).
    Sums of inputs are made first, which overflow beyond 8e37 ("fast": 3e36).

    ``packed``: `pack_conv3x3` of this very weight, which saves what is otherwise done in every call; who passes it
    says that the weight has not changed since. Autocast does not touch the op. Differentiable any number of times; by
    weight by torch's convolutions. Raises RuntimeError for shapes, dtypes and devices that do not fit (a GPU's
    convolutions are cuDNN's: torch.nn.functional.conv2d), and for a ``packed`` that requires grad; ValueError for an
    unknown `precision`.
    """
    form = _form(upsample, precision)
    _check("conv3x3", x=x, weight=weight)
    refuse_tangents("conv3x3", x, weight, bias, packed)
    if packed is not None and packed.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "diffkern.conv3x3: packed must not require grad, as the gradient goes to weight: use packed.detach()"
        )
    args = x, weight, bias, packed, form
    if active() or differentiates(x, weight, bias):
        y: Tensor = (_Conv3x3.apply if active() else native.conv3x3)(*args)
        return y
    with below_autograd():
        y = native.conv3x3(*args)
    return y


@explained("pack_conv3x3")
def pack_conv3x3(weight: Tensor, *, upsample: bool = False, precision: Precision = "exact") -> Tensor:
    """G g G^T of the weight [K, C, 3, 3] of `conv3x3`, in the order of this machine's products.

    For the same ``upsample`` and ``precision``, while the weight does not change: a float32 tensor of
    64 n ceil(K / 64) C numbers, n = 16, 36 ("fast") or 9 (upsampled). Not for storing: the order may change. It has no
    gradient (that of `conv3x3` goes to the weight itself): a weight that requires grad is packed under torch.no_grad().
    Raises as `conv3x3` does.
    """
    _check("pack_conv3x3", weight=weight)
    refuse_grad("pack_conv3x3", weight)
    packed: Tensor = native.pack_conv3x3(weight, _form(upsample, precision))
    return packed


def _form(upsample: bool, precision: Precision) -> int:
    if precision not in _FORMS:
        raise ValueError(unknown("precision", precision, list(_FORMS)))
    return _UPSAMPLED if upsample else _FORMS[precision]


def _check(name: str, **operands: Tensor) -> None:
    refuse_onnx(name, "torch.nn.functional.conv2d")
    for argument, t in operands.items():
        if isinstance(t, Tensor) and t.device.type not in ("cpu", "meta"):
            raise RuntimeError(
                f"diffkern.{name}: {argument} must be on the CPU, got {t.device}: a GPU's convolutions are cuDNN's, by "
                "torch.nn.functional.conv2d"
            )


@torch.library.register_fake("diffkern::pack_conv3x3")
def _(weight: Tensor, form: int) -> Tensor:
    outputs, inputs = _sizes("pack_conv3x3", weight)
    return weight.new_empty([_points("pack_conv3x3", form) * ((outputs + _PANEL - 1) // _PANEL * _PANEL) * inputs])


@torch.library.register_fake("diffkern::conv3x3")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None, form: int) -> Tensor:
    one_device("conv3x3", x=x, weight=weight, bias=bias, packed=packed)
    outputs, inputs = _sizes("conv3x3", weight)
    if x.dim() != 4 or x.shape[1] != inputs:
        rule = "x must have shape [batch, inputs, height, width] with the inputs of weight"
        raise RuntimeError(f"diffkern.conv3x3: {rule}, {inputs}, got {list(x.shape)}")
    _points("conv3x3", form)
    scale = 2 if form == _UPSAMPLED else 1
    shape = x.shape[0], outputs, scale * x.shape[2], scale * x.shape[3]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _sizes(name: str, weight: Tensor) -> Any:
    if weight.dim() != 4 or tuple(weight.shape[2:]) != (3, 3):
        rule = "weight must have shape [outputs, inputs, 3, 3]"
        raise RuntimeError(f"diffkern.{name}: {rule}, got {list(weight.shape)}")
    return weight.shape[:2]


def _points(name: str, form: int) -> int:
    if form not in _POINTS:
        rule = "form must be 0 (F(2, 3)), 1 (F(4, 3)) or 2 (upsampled)"
        raise RuntimeError(f"diffkern.{name}: {rule}, got {form}")
    return _POINTS[form]


# ------------------------------------------------------------------------------------------------------- gradients
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, _, ctx.form = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """By x the convolution with the turned weight, by the weight torch's own: differentiable themselves."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    upsampled, empty = ctx.form == _UPSAMPLED, x.numel() == 0 or grad.numel() == 0
    g_x = g_weight = None
    if needs_x and empty:
        g_x = torch.zeros_like(x)
    elif needs_x:
        turned = weight.flip(2, 3).transpose(0, 1)
        form = _FORMS["exact"] if upsampled else ctx.form
        g_x = (_Conv3x3.apply if active() else native.conv3x3)(grad, turned, None, None, form)
        g_x = 4 * F.avg_pool2d(g_x, 2) if upsampled else g_x
    if needs_weight and empty:  # which torch's convolutions do not take
        g_weight = torch.zeros_like(weight)
    elif needs_weight:
        seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsampled else x
        around = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        g_weight = torch.ops.aten.convolution_backward(grad, seen, weight, None, *around, [False, True, False])[1]
    return g_x, g_weight, grad.sum((0, 2, 3)) if ctx.biased and needs_bias else None, None, None


torch.library.register_autograd("diffkern::conv3x3", _backward, setup_context=_setup)
_Conv3x3: Any = function(native.conv3x3, _setup, _backward)
