"""`accelerate` puts diffkern into a loaded pipeline of diffusers, `restore` takes it out again."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from diffkern.compat.diffusers.attention import DiffkernAttnProcessor, why_not
from diffkern.compat.kit import kernels
from diffkern.names import Rng

__all__ = ["Report", "Swap", "accelerate", "restore"]

_ORIGINAL = "_diffkern_original"
"""Attribute of a swapped scheduler: the object it stands for."""


@dataclass(frozen=True)
class Swap:
    """One scheduler or one attention processor of a pipeline: what became of it."""

    component: str
    """The pipeline's name for it: "scheduler", "unet", "vae" ..."""
    layer: str | None
    """The attention layer inside the component; None for a scheduler."""
    before: str
    """The class that was there, with its module."""
    after: str
    """The class that is there now; `before` where nothing was swapped."""
    reason: str | None = None
    """Why nothing was swapped; None where something was."""
    processor: Any = None
    """The processor that is there now."""

    @property
    def swapped(self) -> bool:
        return self.reason is None


class Report(tuple[Swap, ...]):
    """What `accelerate` or `restore` did, one `Swap` a scheduler and attention layer; `print` it to read it."""

    @property
    def swapped(self) -> tuple[Swap, ...]:
        """What was swapped."""
        return tuple(swap for swap in self if swap.swapped)

    @property
    def kept(self) -> tuple[Swap, ...]:
        """What was left as it was, each with its reason."""
        return tuple(swap for swap in self if not swap.swapped)

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Layer -> {reason: calls that ran on the original processor until now, or on torch's attention where it is the
        faster one}, for the layers with such calls."""
        return {
            f"{swap.component}.{swap.layer}": dict(swap.processor.fallbacks)
            for swap in self
            if isinstance(swap.processor, DiffkernAttnProcessor) and swap.processor.fallbacks
        }

    def __str__(self) -> str:
        if not self:
            return "nothing to swap: no scheduler and no attention layer of diffusers"
        groups: dict[tuple[str, str, str, str | None], list[str]] = {}
        for swap in self:
            key = (swap.component, _short(swap.before), _short(swap.after), swap.reason)
            groups.setdefault(key, []).append(swap.layer or "")
        lines = [f"{len(self.swapped)} swapped, {len(self.kept)} kept"]
        for (component, before, after, reason), layers in groups.items():
            count = "" if layers == [""] else f" in {len(layers)} attention layer{'s' * (len(layers) > 1)}"
            what = f"{before} -> {after}" if reason is None else f"{before} kept: {reason}"
            lines.append(f"  {component}: {what}{count}")
        calls: Counter[str] = Counter()
        for reasons in self.fallbacks.values():
            calls.update(reasons)
        if kernels.TORCH_HAS_AMX and any(isinstance(swap.processor, DiffkernAttnProcessor) for swap in self):
            lines.append("  bfloat16 attention runs on torch's kernels where they are faster on this processor (AMX)")
        lines += [f"  fell back to the original in {n} calls: {reason}" for reason, n in calls.items()]
        return "\n".join(lines)


def accelerate(
    pipeline: Any, *, schedulers: bool = True, attention: bool = True, rng: Rng = "torch", exact: bool = False
) -> Report:
    """Puts diffkern's schedulers and attention into a diffusers pipeline, in place; returns what was swapped and what
    not, with the reason. `restore` undoes it. Calling it again swaps what has come since.

    ``pipeline``: a `DiffusionPipeline`, or one of its models (a UNet, a VAE).
    ``schedulers``: every component that is a diffusers scheduler with a class of its name here is replaced by one with
    the same config and state; ``rng`` and ``exact`` are its options. The pipeline's config keeps diffusers' class, so a
    saved pipeline loads without diffkern.
    ``attention``: every diffusers `Attention` layer whose processor computes softmax(Q K^T) V gets a
    `DiffkernAttnProcessor`; calls with an attention mask still run on the original, and those that torch's own
    attention does faster on this processor run on that (`Report.fallbacks`).
    Raises TypeError for anything else than a pipeline or a model.
    """
    swaps: list[Swap] = []
    for name, part in _parts(pipeline):
        if isinstance(part, SchedulerMixin):
            if schedulers:
                swaps.append(_swap_scheduler(pipeline, name, part, rng, exact))
        elif attention:
            swaps += _swap_attention(name, part)
    return Report(swaps)


def restore(pipeline: Any) -> Report:
    """Takes out what `accelerate` put into the pipeline: the very schedulers and processors it had are back.

    A scheduler of diffkern's that the user put there, and not `accelerate`, stays.
    """
    swaps: list[Swap] = []
    for name, part in _parts(pipeline):
        if isinstance(part, SchedulerMixin):
            original = part.__dict__.get(_ORIGINAL)
            if original is not None:
                _set_component(pipeline, name, original)
                swaps.append(Swap(name, None, _name(part), _name(original)))
            elif _is_ours(part):
                swaps.append(Swap(name, None, _name(part), _name(part), "it was not put there by accelerate"))
        else:
            swaps += _restore_attention(name, part)
    return Report(swaps)


def _parts(pipeline: Any) -> list[tuple[str, Any]]:
    """(name, scheduler or model) of a pipeline."""
    if isinstance(pipeline, nn.Module):
        return [(type(pipeline).__name__, pipeline)]
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"pipeline must be a diffusers pipeline or a model, got {type(pipeline).__name__}")
    return [(name, part) for name, part in components.items() if isinstance(part, SchedulerMixin | nn.Module)]


# --------------------------------------------------------------------------------------------------------- schedulers
def _swap_scheduler(pipeline: Any, name: str, scheduler: Any, rng: Rng, exact: bool) -> Swap:
    before = _name(scheduler)
    if _is_ours(scheduler):
        return Swap(name, None, before, before, "it is diffkern's already")
    ours = getattr(_package(), type(scheduler).__name__, None)
    if ours is None:
        return Swap(name, None, before, before, "diffkern has no scheduler of this name")
    if ours.__mro__[1:].count(type(scheduler)) == 0:
        return Swap(name, None, before, before, "it is not diffusers' own class of this name")
    new = ours.__new__(ours)
    state = {key: list(value) if isinstance(value, list) else value for key, value in scheduler.__dict__.items()}
    new.__dict__.update(state)
    new.diffkern(rng=rng, exact=exact)
    new.__dict__[_ORIGINAL] = scheduler
    _set_component(pipeline, name, new)
    return Swap(name, None, before, _name(new))


def _set_component(pipeline: Any, name: str, scheduler: Any) -> None:
    entry = pipeline.config.get(name) if hasattr(pipeline, "config") else None
    setattr(pipeline, name, scheduler)
    if entry is not None:  # a pipeline notes the class of what is assigned; the saved file must name diffusers'
        pipeline.register_to_config(**{name: entry})


def _package() -> Any:
    return sys.modules[__package__]


def _is_ours(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith(f"{__package__}.")


# ---------------------------------------------------------------------------------------------------------- attention
def _layers(model: nn.Module) -> dict[str, Any]:
    """The modules that have a processor, by name."""
    found = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_processor")}
    return {name: layer for name, layer in found.items() if hasattr(layer, "set_processor")}


def _swap_attention(component: str, model: nn.Module) -> list[Swap]:
    layers = _layers(model)
    swaps: list[Swap] = []
    chosen: dict[str, Any] = {}
    for name, layer in layers.items():
        old = layer.get_processor()
        new = old
        reason: str | None = "it is diffkern's already"
        if not isinstance(old, DiffkernAttnProcessor):
            reason = why_not(layer, old)
            new = DiffkernAttnProcessor(old) if reason is None else old
        chosen[name] = new
        swaps.append(Swap(component, name, _name(old), _name(new), reason, new))
    _set_processors(model, layers, chosen)
    return swaps


def _restore_attention(component: str, model: nn.Module) -> list[Swap]:
    layers = _layers(model)
    swaps: list[Swap] = []
    chosen: dict[str, Any] = {}
    for name, layer in layers.items():
        old = layer.get_processor()
        chosen[name] = old
        if isinstance(old, DiffkernAttnProcessor):
            chosen[name] = old.original
            swaps.append(Swap(component, name, _name(old), _name(old.original)))
    _set_processors(model, layers, chosen)
    return swaps


def _set_processors(model: nn.Module, layers: dict[str, Any], chosen: dict[str, Any]) -> None:
    """By the model's own method, where that reaches the layers; models without it (ControlNets' parts) by layer."""
    known: Any = getattr(model, "attn_processors", None)
    set_all: Any = getattr(model, "set_attn_processor", None)
    if known is not None and set_all is not None and set(known) == {f"{n}.processor" for n in chosen}:
        set_all({f"{name}.processor": processor for name, processor in chosen.items()})
        return
    for name, processor in chosen.items():
        layers[name].set_processor(processor)


def _name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _short(name: str) -> str:
    package, _, rest = name.partition(".")
    return f"diffkern's {rest.rpartition('.')[2]}" if package == "diffkern" else rest.rpartition(".")[2] or name
