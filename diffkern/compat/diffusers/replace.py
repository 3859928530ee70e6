"""`replace` runs a loaded network of diffusers on fused blocks, in place; `restore` takes them out again."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import activations, attention, normalization, resnet, upsampling
from diffusers.models.transformers import transformer_2d
from torch import nn

from diffkern.compat.diffusers import _blocks_convolutional as convolutional
from diffkern.compat.diffusers import _blocks_transformer as transformer
from diffkern.compat.diffusers._layers import swap_attention
from diffkern.compat.diffusers._report import ALREADY, Report, Swap, full

__all__ = ["replace"]

_BLOCKS: dict[type, type] = {
    resnet.ResnetBlock2D: convolutional.ResnetBlock2D,
    upsampling.Upsample2D: convolutional.Upsample2D,
    transformer_2d.Transformer2DModel: transformer.Transformer2DModel,
    attention.BasicTransformerBlock: transformer.BasicTransformerBlock,
    normalization.AdaLayerNormZero: transformer.AdaLayerNormZero,
    activations.GEGLU: transformer.GEGLU,
}
"""diffusers' class -> ours, a subclass of it."""
_ENDS: dict[type, type] = {nn.GroupNorm: convolutional.GroupNorm, nn.Conv2d: convolutional.Conv2d}
"""The same of a network's last norm and convolution."""
_ENDS_OF: dict[str, type] = {"conv_norm_out": nn.GroupNorm, "skip_norm": nn.GroupNorm, "conv_out": nn.Conv2d}
"""Where they stand; NCSN++ has an end at every resolution."""
_ORIGINALS = {ours: theirs for theirs, ours in (_BLOCKS | _ENDS).items()}
_WAS_CONTIGUOUS = "_diffkern_was_contiguous"
"""Attribute of a layer whose weight `replace` laid out in channels_last."""


def replace(model: Any) -> Report:
    """Runs a loaded network of diffusers on diffkern's fused parts, in place; returns what was replaced and what not,
    with the reason. `restore` undoes it.

    ``model``: a `UNet2DModel`, `UNet2DConditionModel`, `DiTTransformer2DModel`, `ControlNetModel`, `AutoencoderKL`, or
    any other `torch.nn.Module` with the same blocks.

    The objects stay: weights, module tree, state dict, config and hooks are the ones that were there, and what is saved
    loads without diffkern. Blocks get a subclass of their class: `ResnetBlock2D` (norm, time embedding and SiLU in
    `diffkern.group_norm_act`), `Transformer2DModel`, `BasicTransformerBlock`, `GEGLU`, `AdaLayerNormZero`, `Upsample2D`
    and the last norm; attention layers a `DiffkernAttnProcessor`, as `accelerate` does it. Convolution weights are laid
    out in channels_last (once, and back by `restore`), and so are the activations; what the network returns is
    contiguous. A layer inside a block that is no longer torch's own (LoRA) or carries hooks is called, never read.
    A block is left alone where it is a subclass of diffusers' class or has a `forward` of its own on the object, which
    offloading hooks put there: call `replace` first. On devices without kernels diffusers' code runs.

    Results are diffusers' up to float32 rounding; gradients once, no forward-mode differentiation. Calling it again
    replaces what has come since. Raises TypeError for anything else than a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a network of diffusers, got {type(model).__name__}")
    name = type(model).__name__
    return Report([*swap_attention(name, model), *swap_blocks(name, model)])


def swap_blocks(component: str, model: nn.Module) -> list[Swap]:
    """Gives every block its class of ours, and the weights of convolutions channels_last."""
    swaps: list[Swap] = []
    for name, module, new in _candidates(model):
        before = type(module)
        reason = ALREADY if before in _ORIGINALS else _why_not(module)
        if reason is None:
            module.__class__ = new
        swaps.append(Swap(component, name, full(before), full(type(module)), reason))
    if any(type(module) in _ORIGINALS for module in model.modules()):
        for module in model.modules():
            _to_channels_last(module)
    return swaps


def restore_blocks(component: str, model: nn.Module) -> list[Swap]:
    """Gives every block the class back that it had, and the weights of convolutions their layout."""
    swaps: list[Swap] = []
    for name, module in model.named_modules():
        theirs = _ORIGINALS.get(type(module))
        if theirs is not None:
            swaps.append(Swap(component, name, full(type(module)), full(theirs)))
            module.__class__ = theirs
        if module.__dict__.pop(_WAS_CONTIGUOUS, False):
            for parameter in _images(module):
                parameter.data = parameter.data.contiguous()
    return swaps


def _candidates(model: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, module, class of ours) of the blocks, replaced or not, and of the ends of the networks that have some."""
    known = (*_BLOCKS, resnet.ResnetBlockCondNorm2D)
    found = {
        name: (module, next((ours for theirs, ours in _BLOCKS.items() if isinstance(module, theirs)), None))
        for name, module in model.named_modules()
        if isinstance(module, known)
    }
    if found:
        for name, module in model.named_modules():
            for end, kind in _ENDS_OF.items():
                last = getattr(module, end, None)
                if isinstance(last, nn.Module) and (end != "conv_out" or hasattr(module, "conv_norm_out")):
                    found[f"{name}.{end}".lstrip(".")] = (last, _ENDS[kind])
    return [(name, module, new) for name, (module, new) in found.items()]


def _why_not(module: Any) -> str | None:
    """Why the block is left as it is, one sentence; None where it is replaced."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "it has a forward of its own, as offloading hooks put there: call replace before them"
    if kind is resnet.ResnetBlockCondNorm2D:
        return "its norms depend on the embedding in another way (ada_group, spatial)"
    if kind not in _BLOCKS and kind not in _ENDS:
        return f"{kind.__name__} is not the class of diffusers or torch that is known here, and may compute anything"
    if kind is transformer_2d.Transformer2DModel and not module.is_input_continuous:
        return "its input is not an image of channels"
    if kind is attention.BasicTransformerBlock and (
        module.norm_type not in transformer.NORMS or module.pos_embed is not None
    ):
        return f"blocks with norm_type {module.norm_type} and positional embeddings are not known here"
    return None


def _images(module: nn.Module) -> list[nn.Parameter]:
    """A module's own parameters that torch's channels_last is for."""
    return [p for p in module.parameters(recurse=False) if type(p) is nn.Parameter and p.dim() == 4]


def _to_channels_last(module: nn.Module) -> None:
    """As `module.to(memory_format=torch.channels_last)` does, and notes it where it changes something."""
    for parameter in _images(module):
        if not parameter.is_contiguous(memory_format=torch.channels_last) and parameter.is_contiguous():
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
            module.__dict__[_WAS_CONTIGUOUS] = True
