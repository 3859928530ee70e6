"""The base class of solvers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn


class Solver(ABC, nn.Module):
    """Something that samples."""

    @abstractmethod
    def sample(self, x_0: Tensor | None = None) -> Any:
        """Samples from ``x_0``."""
