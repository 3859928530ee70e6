"""Tables and operands that the tests of learned_step share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffkern.ops import LEARNED_COLUMNS

FROM_EPS, FROM_X0 = {"p": 1.25, "q": -0.75}, {"a": 0.625, "b": 0.375}
RANGE = {"g": 1.0, "r0": -3.1, "r1": 0.9, "stream": 2.0**41 + 5}
MASKED = {"known_s": 0.9, "known_n": 0.43, "known_stream": 3.0 * 2**40 + 1}
ROWS: dict[str, dict[str, float]] = {
    "range": {**FROM_EPS, **FROM_X0, **RANGE},
    "range clip": {**FROM_EPS, **FROM_X0, **RANGE, "clip": 1.0},
    "direct": {**FROM_EPS, **FROM_X0, **RANGE, "r0": 0.0, "r1": 1.0},
    "slope": {"a": 1.0, "d": -0.3, **RANGE, "g": 0.7},
    "fixed": {**FROM_EPS, "b": 0.8, "d": 0.2, **RANGE, "r1": 0.0},
    "last": {**FROM_EPS, **FROM_X0, **RANGE, "g": 0.0, "clip": 1.0},
    "noise alone": {"a": 1.0, **RANGE},
    "masked": {**FROM_EPS, **FROM_X0, **RANGE, **MASKED, "k": 0.8},
}


def table(*rows: dict[str, float]) -> Tensor:
    defaults = {"clip": math.inf, "k": 1.0}
    found = [[{**defaults, **row}.get(name, 0.0) for name in LEARNED_COLUMNS] for row in rows]
    return torch.tensor(found, dtype=torch.float64)


def twice(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], *shape[2:])
