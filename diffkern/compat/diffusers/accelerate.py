"""`accelerate` puts diffkern into a loaded pipeline of diffusers, `restore` takes it out again."""

from __future__ import annotations

import sys
from typing import Any

from diffusers import SchedulerMixin
from torch import nn

from diffkern.compat.diffusers._layers import restore_attention, swap_attention
from diffkern.compat.diffusers._report import ALREADY, Report, Swap, full
from diffkern.compat.diffusers.replace import restore_blocks, swap_blocks
from diffkern.names import Rng

__all__ = ["Report", "Swap", "accelerate", "restore"]

_ORIGINAL = "_diffkern_original"
"""Attribute of a swapped scheduler: the object it stands for."""


def accelerate(
    pipeline: Any,
    *,
    schedulers: bool = True,
    attention: bool = True,
    networks: bool = False,
    rng: Rng = "torch",
    exact: bool = False,
) -> Report:
    """Puts diffkern's schedulers, attention and blocks into a diffusers pipeline, in place; returns what was swapped
    and what not, with the reason. `restore` undoes it. Calling it again swaps what has come since.

    ``pipeline``: a `DiffusionPipeline`, or one of its models (a UNet, a VAE).
    ``schedulers``: every component that is a diffusers scheduler with a class of its name here is replaced by one with
    the same config and state; ``rng`` and ``exact`` are its options. The pipeline's config keeps diffusers' class, so a
    saved pipeline loads without diffkern.
    ``attention``: every diffusers `Attention` layer whose processor computes softmax(Q K^T) V gets a
    `DiffkernAttnProcessor`; calls with an attention mask still run on the original, and those that torch's own
    attention does faster on this processor run on that (`Report.fallbacks`).
    ``networks``: the blocks of every network are replaced as `replace` does it, and run in channels_last.
    Raises TypeError for anything else than a pipeline or a model.
    """
    swaps: list[Swap] = []
    for name, part in _parts(pipeline):
        if isinstance(part, SchedulerMixin):
            if schedulers:
                swaps.append(_swap_scheduler(pipeline, name, part, rng, exact))
            continue
        if attention:
            swaps += swap_attention(name, part)
        if networks:
            swaps += swap_blocks(name, part)
    return Report(swaps)


def restore(pipeline: Any) -> Report:
    """Takes out what `accelerate` put into the pipeline: the very schedulers, processors and blocks it had are back,
    and its weights lie in memory as they did.

    A scheduler of diffkern's that the user put there, and not `accelerate`, stays.
    """
    swaps: list[Swap] = []
    for name, part in _parts(pipeline):
        if isinstance(part, SchedulerMixin):
            original = part.__dict__.get(_ORIGINAL)
            if original is not None:
                _set_component(pipeline, name, original)
                swaps.append(Swap(name, None, full(type(part)), full(type(original))))
            elif _is_ours(part):
                swaps.append(Swap(name, None, full(type(part)), full(type(part)), "it was not put there by accelerate"))
        else:
            swaps += restore_attention(name, part)
            swaps += restore_blocks(name, part)
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
    before = full(type(scheduler))
    if _is_ours(scheduler):
        return Swap(name, None, before, before, ALREADY)
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
    return Swap(name, None, before, full(type(new)))


def _set_component(pipeline: Any, name: str, scheduler: Any) -> None:
    entry = pipeline.config.get(name) if hasattr(pipeline, "config") else None
    setattr(pipeline, name, scheduler)
    if entry is not None:  # a pipeline notes the class of what is assigned; the saved file must name diffusers'
        pipeline.register_to_config(**{name: entry})


def _package() -> Any:
    return sys.modules[__package__]


def _is_ours(scheduler: Any) -> bool:
    return type(scheduler).__module__.startswith(f"{__package__}.")
