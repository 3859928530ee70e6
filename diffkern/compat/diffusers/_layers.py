"""The attention layers of a model: their processors swapped for diffkern's, and back."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffkern.compat.diffusers._report import ALREADY, Swap, full
from diffkern.compat.diffusers.attention import DiffkernAttnProcessor, why_not


def layers(model: nn.Module) -> dict[str, Any]:
    """The modules that have a processor, by name."""
    found = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_processor")}
    return {name: layer for name, layer in found.items() if hasattr(layer, "set_processor")}


def swap_attention(component: str, model: nn.Module) -> list[Swap]:
    """Gives every layer that `why_not` names no reason for a `DiffkernAttnProcessor`."""
    found = layers(model)
    swaps: list[Swap] = []
    chosen: dict[str, Any] = {}
    for name, layer in found.items():
        old = layer.get_processor()
        new = old
        reason: str | None = ALREADY
        if not isinstance(old, DiffkernAttnProcessor):
            reason = why_not(layer, old)
            new = DiffkernAttnProcessor(old) if reason is None else old
        chosen[name] = new
        swaps.append(Swap(component, name, full(type(old)), full(type(new)), reason, new))
    _set_processors(model, found, chosen)
    return swaps


def restore_attention(component: str, model: nn.Module) -> list[Swap]:
    """Gives the layers the very processors back that they had."""
    found = layers(model)
    swaps: list[Swap] = []
    chosen: dict[str, Any] = {}
    for name, layer in found.items():
        old = layer.get_processor()
        chosen[name] = old
        if isinstance(old, DiffkernAttnProcessor):
            chosen[name] = old.original
            swaps.append(Swap(component, name, full(type(old)), full(type(old.original)), None, old.original))
    _set_processors(model, found, chosen)
    return swaps


def _set_processors(model: nn.Module, found: dict[str, Any], chosen: dict[str, Any]) -> None:
    """By the model's own method, where that reaches the layers; models without it (ControlNets' parts) by layer."""
    known: Any = getattr(model, "attn_processors", None)
    set_all: Any = getattr(model, "set_attn_processor", None)
    if known is not None and set_all is not None and set(known) == {f"{n}.processor" for n in chosen}:
        set_all({f"{name}.processor": processor for name, processor in chosen.items()})
        return
    for name, processor in chosen.items():
        found[name].set_processor(processor)
