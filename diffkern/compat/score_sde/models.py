"""Networks and scores, as score_sde's ``models.utils``: which label a network is given, and how its output is a score.

| SDE | continuous | label | score |
|---|---|---|---|
| VP | yes | 999 t | -m/std(t) |
| VP | no | (N - 1) t | -m/sqrt(1 - abar_i), i = floor(label) |
| sub-VP | either | 999 t | -m/std(t) |
| VE | yes | sigma(t) | m |
| VE | no | round((N - 1)(T - t)), int64 | m |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.score_sde import _rows, sde_lib

__all__ = [
    "ScoreFunction",
    "from_flattened_numpy",
    "get_model_fn",
    "get_score_fn",
    "get_sigmas",
    "to_flattened_numpy",
]


def get_model_fn(model: Any, train: bool = False) -> Callable[[Tensor, Tensor], Any]:
    """``model(x, labels)`` in its training or evaluation mode."""

    def model_fn(x: Tensor, labels: Tensor) -> Any:
        set_mode(model, train)
        return model(x, labels)

    return model_fn


def set_mode(model: Any, train: bool) -> None:
    """A plain function has no mode."""
    if hasattr(model, "train"):
        model.train(train)


class ScoreFunction(_rows.NetworkScore):
    """score(x, t) = scale(t) network(x, t); see the module's table."""

    def __init__(self, sde: Any, model: Any, train: bool = False, continuous: bool = False) -> None:
        self.sde, self.model, self.train, self.continuous = sde, model, train, continuous
        self.exploding = isinstance(sde, sde_lib.VESDE)
        """Whether the network's output is the score."""
        self.fits = _rows.linear(sde, "marginal_prob")
        if not isinstance(sde, sde_lib.VPSDE | sde_lib.subVPSDE | sde_lib.VESDE):
            raise sde_lib.unsupported(sde)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        m, std = self.network(x, t), self._divisor(t, x)
        return m if std is None else -m / _rows.column(std, x)

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """The network's output at the times t."""
        set_mode(self.model, self.train)
        m: Tensor = self.model(x, self.labels(t, x))
        return m

    def labels(self, t: Tensor, x: Tensor | None = None) -> Tensor:
        """What the network is given for the times t (and the states x, for an SDE of the user's own)."""
        if self.exploding:
            if self.continuous:
                return self._std(t, x)
            return torch.round((self.sde.T - t) * (self.sde.N - 1)).long()
        if self.continuous or isinstance(self.sde, sde_lib.subVPSDE):
            return t * 999
        return t * (self.sde.N - 1)

    def scale(self, t: Tensor) -> Tensor | None:
        """What the network's output is multiplied by, [B] float64; None for 1."""
        std = self._divisor(t)
        return None if std is None else -1.0 / std.double()

    def _divisor(self, t: Tensor, x: Tensor | None = None) -> Tensor | None:
        if self.exploding:
            return None
        if self.continuous or isinstance(self.sde, sde_lib.subVPSDE):
            return self._std(t, x)
        return _rows.on_device(self.sde, "sqrt_1m_alphas_cumprod", t.device)[self.labels(t).long()]

    def _std(self, t: Tensor, x: Tensor | None) -> Tensor:
        return _rows.std(self.sde, t, None if self.fits or x is None else torch.zeros_like(x))


def get_score_fn(sde: Any, model: Any, train: bool = False, continuous: bool = False) -> ScoreFunction:
    """The score function of a network trained for ``sde``."""
    return ScoreFunction(sde, model, train=train, continuous=continuous)


def get_sigmas(config: Any) -> np.ndarray:
    """``config.model.num_scales`` noise levels of SMLD from sigma_max down to sigma_min, even in the logarithm."""
    model = config.model
    levels: np.ndarray = np.exp(np.linspace(np.log(model.sigma_max), np.log(model.sigma_min), model.num_scales))
    return levels


def to_flattened_numpy(x: Tensor) -> np.ndarray:
    """The elements as a vector on the host."""
    flat: np.ndarray = x.detach().cpu().numpy().reshape((-1,))
    return flat


def from_flattened_numpy(x: np.ndarray, shape: Sequence[int]) -> Tensor:
    """`to_flattened_numpy` undone."""
    return torch.from_numpy(x.reshape(tuple(shape)))
