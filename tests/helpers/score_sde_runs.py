"""What the tests of compat.score_sde share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.compat.score_sde import sde_lib
from helpers.score_sde_algorithms import Process

KINDS = ("vp", "subvp", "ve")


def both(kind: str, N: int = 40) -> tuple[Any, Process]:
    """The SDE and its transcription."""
    if kind == "ve":
        return sde_lib.VESDE(0.02, 30.0, N), Process("ve", 0.02, 30.0, N)
    made = (sde_lib.VPSDE if kind == "vp" else sde_lib.subVPSDE)(0.2, 15.0, N)
    return made, Process(kind, 0.2, 15.0, N)


class Net(nn.Module):
    """A small network that knows its labels."""

    def __init__(self, ve: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(2, 2, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.3))
        self.ve = ve

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        at = labels.to(x.dtype)[:, None, None, None]
        small = x / (1.0 + x.square().mean((1, 2, 3), keepdim=True)).sqrt() if self.ve else x
        return self.scale * small + torch.tanh(self.body(small) + 1e-3 * at)


def difference(found: Tensor, want: Tensor) -> float:
    return float((found - want).detach().abs().max() / want.detach().abs().max())


def tight(dtype: torch.dtype) -> float:
    return 4e-6 if dtype == torch.float32 else 1e-12


class Squared(sde_lib.VPSDE):
    """An SDE of the user's own."""

    def marginal_prob(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().marginal_prob(x, t)
        return mean.square(), std
