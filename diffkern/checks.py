"""What a function of the user's returned, checked; and how errors say it."""

from __future__ import annotations

import torch
from torch import Tensor


def got(value: object) -> str:
    """What an error says of a value: its shape, or its type where it is no tensor."""
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def must_return(value: object, rule: str, name: str = "model") -> str:
    """The sentence of an error about a ``value`` that the function ``name`` returned."""
    return f"{name} must return {rule}, got {got(value)}"


def returned(value: object, shape: torch.Size, name: str = "model", row: int | None = None) -> Tensor:
    """The ``value`` that the function ``name`` returned (at ``row`` of a plan); ValueError unless it has ``shape``."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    text = must_return(value, f"a tensor of shape {list(shape)}", name)
    raise ValueError(text if row is None else f"{text} at row {row}")
