"""The base class of models with a forward pass of their own."""

from __future__ import annotations

from abc import ABC
from typing import Any

from torch import Tensor, nn


class ModelWrapper(ABC, nn.Module):
    """A model around ``model``: override `forward` to give it what it expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        """``model(x=x, t=t, **extras)``: x [B, ...], t [] or [B]."""
        out: Tensor = self.model(x=x, t=t, **extras)
        return out
