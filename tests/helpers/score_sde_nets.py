"""Networks and processes that the tests of compat.score_sde share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.compat.score_sde import sampling, sde_lib
from helpers.score_sde_algorithms import Process

SHAPE = (3, 2, 5, 4)
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")
CORRECTORS = ("langevin", "ald", "none")
KINDS = ("vp", "subvp", "ve")


def both(kind: str, N: int = 12) -> tuple[Any, Process]:
    """The SDE and its transcription."""
    if kind == "ve":
        return sde_lib.VESDE(0.02, 30.0, N), Process("ve", 0.02, 30.0, N)
    made = (sde_lib.VPSDE if kind == "vp" else sde_lib.subVPSDE)(0.2, 8.0, N)
    return made, Process(kind, 0.2, 8.0, N)


class Net(torch.nn.Module):
    """Like a trained network: close to the noise for VP, to its score for VE; its noise depends on the generator."""

    def __init__(self, kind: str, random: bool = False) -> None:
        super().__init__()
        self.kind, self.random = kind, random
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.labels.append(labels)
        at = labels.to(x.dtype)[:, None, None, None]
        out = (0.8 * x + 0.2 * torch.tanh(x)) * (1.0 + 1e-4 * at)
        if self.kind == "ve":
            out = -x / (1.0 + x.square()) - 0.1 * torch.tanh(at * 1e-3 + x)
        return out + 0.01 * torch.randn_like(x) if self.random else out


def difference(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max() / want.abs().max())


def limit(dtype: torch.dtype, steps: int) -> float:
    """2e-6 a step in float32, 1e-12 in all in float64."""
    return 2e-6 * steps if dtype == torch.float32 else 1e-12


def run(sde: Any, predictor: Any, corrector: Any, net: Any, **options: Any) -> Tensor:
    if isinstance(predictor, str):
        predictor = sampling.get_predictor(predictor)
    if isinstance(corrector, str):
        corrector = sampling.get_corrector(corrector)
    options = {"continuous": True, "device": "cpu", **options}
    found: Tensor = sampling.get_pc_sampler(sde, SHAPE, predictor, corrector, lambda x: x, 0.16, **options)(net)[0]
    return found
