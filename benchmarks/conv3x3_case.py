"""The case of convolutions of 3 x 3 taps by Winograd's products, beside torch's: layers of DDPM, ADM, Stable Diffusion.

On the CPU alone, as the op is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor
from diffkern import ops, reference

__all__ = ["TABLE"]

ROUNDINGS = 1e-5  # of sums of 9 C products in float32, in any order


def conv3x3(
    name: str,
    setting: Setting,
    shape: tuple[int, int, int, int],
    goal: float | None = None,
    packed: bool = True,
    upsample: bool = False,
    fast: bool = False,
) -> Case:
    """One layer. Shape: images, inputs, height and width, outputs; ``packed``: weights are packed beforehand."""
    batch, inputs, side, outputs = shape
    x = random_tensor(0, (batch, inputs, side, side), setting).contiguous(memory_format=torch.channels_last)
    weight = random_tensor(1, (outputs, inputs, 3, 3), setting) / (9 * inputs) ** 0.5
    bias = random_tensor(2, (1, outputs), setting)[0]
    form: dict[str, Any] = {"upsample": upsample, "precision": "fast" if fast else "exact"}
    kept = ops.pack_conv3x3(weight, **form) if packed else None
    theirs = weight.contiguous(memory_format=torch.channels_last)

    def seen() -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x

    def ours() -> Tensor:
        return ops.conv3x3(x, weight, bias, packed=kept, **form)

    def channels_last() -> Tensor:
        return F.conv2d(seen(), theirs, bias, padding=1)

    prepacked, note = _prepacked(weight, bias, seen)

    def check() -> list[Check]:
        exact = reference.conv3x3(x, weight, bias, upsample=upsample)
        found = [compare("ours", ours(), exact, loose(x.dtype) if fast else ROUNDINGS)]
        found.append(compare("channels_last", channels_last(), exact, loose(x.dtype)))
        return found if prepacked is None else [*found, compare("prepacked", prepacked(), exact, loose(x.dtype))]

    baselines = (
        Baseline("channels_last", channels_last, cpu_target(goal, setting)),
        Baseline("prepacked", prepacked, note=note),
    )
    written = batch * outputs * side * side * (4 if upsample else 1) * x.element_size()
    moved = bytes_of(x, weight if kept is None else kept, bias) + written
    title = f"convolution 3 x 3{', upsampled' if upsample else ''}{', fast' if fast else ''}"
    title += "" if packed else ", weights packed in the call"
    return Case(name, title, shape, x.dtype, functools.partial(ours), baselines, check, moved)


def _prepacked(weight: Tensor, bias: Tensor, seen: Callable[[], Tensor]) -> tuple[Callable[[], Tensor] | None, str]:
    """oneDNN's convolution of weights in the order it chose, as torch.compile calls it for a frozen network."""
    try:
        around: Any = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
        sizes = list(seen().shape)
        kept = torch.ops.mkldnn._reorder_convolution_weight(weight, *around, sizes)
        torch.ops.mkldnn._convolution_pointwise(seen(), kept, bias, *around, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        return None, f"torch has no prepacked convolution here: {str(error).splitlines()[0][:80]}"
    return lambda: torch.ops.mkldnn._convolution_pointwise(seen(), kept, bias, *around, "none", [], ""), ""


DDPM, TRAINING, ADM, SD = (1, 128, 32, 128), (4, 256, 16, 256), (1, 192, 64, 192), (1, 320, 64, 320)
TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "conv3x3-ddpm": (conv3x3, {"shape": DDPM}),
    "conv3x3-ddpm-unpacked": (conv3x3, {"shape": DDPM, "packed": False}),
    "conv3x3-batch": (conv3x3, {"shape": TRAINING}),
    "conv3x3-batch-unpacked": (conv3x3, {"shape": TRAINING, "packed": False}),
    "conv3x3-adm": (conv3x3, {"shape": ADM}),
    "conv3x3-adm-upsampled": (conv3x3, {"shape": (1, 192, 32, 192), "upsample": True}),
    "conv3x3-sd": (conv3x3, {"shape": SD}),
    "conv3x3-sd-fast": (conv3x3, {"shape": SD, "fast": True}),
}
