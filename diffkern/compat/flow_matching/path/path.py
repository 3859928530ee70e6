"""The base class of paths."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from diffkern.compat.flow_matching.path.path_sample import PathSample


class ProbPath(ABC):
    """A probability path from x_0 at t = 0 to x_1 at t = 1."""

    @abstractmethod
    def sample(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
        """The state at t [B] given both ends [B, ...]."""

    def assert_sample_shape(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> None:
        """Raise AssertionError unless t is [B] with the batch size of x_0 and x_1."""
        if t.ndim != 1:
            raise AssertionError(f"t must have shape [B], one time a sample, got {list(t.shape)}")
        if not t.shape[0] == x_0.shape[0] == x_1.shape[0]:
            raise AssertionError(
                f"t, x_0 and x_1 must have one batch size, got {t.shape[0]}, {x_0.shape[0]} and {x_1.shape[0]}"
            )
