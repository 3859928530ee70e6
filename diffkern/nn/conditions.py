"""Conditions of a network: what a caller gives, checked once, in one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkern.modes import readable

KEYS = ("class", "context", "vector", "ids", "image", "augment", "residuals", "middle_residual")


class Known(NamedTuple):
    """What a network makes of time and condition, and the state does not decide."""

    changes: tuple[Tensor, ...]
    """Each block's modulation [B, ...], in the order in which the blocks run."""
    contexts: tuple[Tensor, ...] = ()
    """Each cross-attention's keys and values [B, T, 2 C], in the order in which they run."""


def as_mapping(cond: Any) -> dict[str, Any]:
    """A condition by its parts: those of a dict, or the class where it is a tensor. ValueError for another key."""
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        return {"class": cond}
    if not isinstance(cond, Mapping):
        raise ValueError(
            f"cond must be None, an integer tensor of classes or a dict of {', '.join(KEYS)}, got {type(cond).__name__}"
        )
    for key in cond:
        if key not in KEYS:
            raise ValueError(f"cond has the keys {', '.join(KEYS)}, got {key!r}")
    return {key: value for key, value in cond.items() if value is not None}


def check_times(t: Tensor, batch: int, weight: Tensor) -> Tensor:
    """The times as [1] or [B], on the device of the ``weight``, where one time for all need not lie.

    ValueError for another number of them, for complex ones, and for times on another device.
    """
    if not isinstance(t, Tensor):
        raise ValueError(f"t must be a tensor of times, got {type(t).__name__}")
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, batch)):
        raise ValueError(f"t must be 0-dim or have one time for each of the {batch} samples, got {tuple(t.shape)}")
    if t.is_complex():
        raise ValueError(f"t must be real, got {t.dtype}")
    if t.dim() and t.device != weight.device:
        raise ValueError(f"t must be on {weight.device}, the device of the weights, got {t.device}")
    return t.reshape(-1).to(weight.device)


def weight_of(network: nn.Module) -> Tensor:
    """A tensor of the network's dtype and device, whatever stands in the place of its layers.

    The first floating-point parameter, or else buffer: quantised layers have integers, or no tensors of their own.
    """
    for tensors in (network.parameters(), network.buffers()):
        for t in tensors:
            if t.is_floating_point():
                return t
    raise ValueError("the network must have a floating-point parameter or buffer, got none")


def check_unconditional(cond: Any) -> None:
    """ValueError for a condition, of a network that has no use for one."""
    if cond is not None:
        got = f"{cond.dtype} {tuple(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
        raise ValueError(f"cond must be None for a network without condition, got {got}")


def embed_classes(
    table: Callable[[Tensor], Tensor],
    most: int,
    classes: Any,
    batch: int,
    device: torch.device,
    *,
    none: bool = True,
) -> Tensor:
    """[B, E] of classes [B] in 0..most: another is a ValueError on the CPU, and NaN where values are not read.

    `none`: whether the last of them means no class.
    """
    integer = isinstance(classes, Tensor) and not classes.is_floating_point() and classes.dtype != torch.bool
    if not integer or classes.shape != (batch,):
        got = f"{classes.dtype} {tuple(classes.shape)}" if isinstance(classes, Tensor) else type(classes).__name__
        raise ValueError(f"cond must be an integer tensor of shape ({batch},), got {got}")
    if classes.device != device:
        raise ValueError(f"cond must be on {device}, the device of the weights, got {classes.device}")
    classes = classes.to(torch.int64)
    if readable(classes):
        if batch and not 0 <= int(classes.min()) <= int(classes.max()) <= most:
            odd = [int(c) for c in classes.tolist() if not 0 <= c <= most]
            means = f" ({most} means none)" if none else ""
            raise ValueError(f"cond must hold classes in 0..{most}{means}, got {odd[0]}")
        return table(classes)
    outside = (classes < 0) | (classes > most)
    found = table(classes.clamp(0, most))
    return found.masked_fill(outside[:, None], float("nan"))


def expect(name: str, value: Any, shape: tuple[int | None, ...], x: Tensor) -> Tensor:
    """``cond[name]``, which must be a real tensor of this shape (None: any size) on the device of x, of any dtype."""
    wanted = f"({', '.join('any' if n is None else str(n) for n in shape)})"
    fits = (
        isinstance(value, Tensor)
        and value.dim() == len(shape)
        and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
    )
    if not fits:
        got = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"cond[{name!r}] must have shape {wanted}, got {got}")
    if value.is_complex():
        raise ValueError(f"cond[{name!r}] must be real, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"cond[{name!r}] must be on {x.device}, the device of x, got {value.device}")
    found: Tensor = value
    return found


def check_state(x: Any, channels: int, divisor: int, weight: Tensor, name: str = "x") -> None:
    """Raise ValueError unless x is [B, channels, H, W], H and W divisible, of the weights' dtype and device."""
    if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != channels:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must have shape (B, {channels}, H, W), got {got}")
    if x.shape[2] % divisor or x.shape[3] % divisor or not x.shape[2] or not x.shape[3]:
        raise ValueError(f"height and width of {name} must be divisible by {divisor}, got {tuple(x.shape)}")
    if x.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device}, the device of the weights, got {x.device}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{name} must have {weight.dtype}, the dtype of the weights, got {x.dtype}")
