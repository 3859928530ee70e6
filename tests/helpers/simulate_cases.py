"""Mixtures, times and seeds that the tests of simulations share."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern import ops, schedules
from helpers.oracles import Mixture

DATA = Mixture()
N = 4_000


def mixture_score(schedule: schedules.Schedule):
    return lambda x, t: DATA.predict(schedule, "score", x, t).to(x.dtype)


def spaced(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n + 1, dtype=torch.float64)


def slope(steps: list[int], errors: list[float]) -> float:
    """Observed order: - d ln error/d ln steps by least squares."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).double().log()
    return -float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def seeds(n: int = N) -> Tensor:
    return ops.seeds(7, n)
