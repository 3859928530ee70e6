"""Tables and operands that the tests of step_logprob share."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.op_cases import EVERYTHING, values
from helpers.op_cases import table as step_table

DDPM = {"p": 1.25, "q": -0.75, "clip": 1.0, "a": 0.3, "b": 0.6, "g": 0.2}
EULER = {"a": 1.0, "d": -0.3, "g": 0.7}
GUIDED = {"p": 1.25, "q": -0.75, "b": 0.875, "d": 0.5, "w": 2.5, "g": 0.4}
SILENT = {**DDPM, "g": 0.0}
ALL = {**{k: v for k, v in EVERYTHING.items() if k != "r"}, "g": 0.5}
HISTORIES = {"a": 0.5, "e0": 0.1, "e1": -0.2, "e2": 0.3, "e3": -0.4, "g": -1.3}
TABLE = step_table(DDPM, EULER, GUIDED, SILENT, ALL, HISTORIES, {"p": 0.7, "b": 0.2, "g": 1e-3})
PLAIN = {**{k: v for k, v in ALL.items() if k not in ("w", "e0", "e1", "e2", "e3", "A", "B", "D")}, "clip": 0.8}
LEARNED = torch.cat(
    [
        step_table(DDPM, {**EULER, "g": 1.0}, PLAIN, SILENT),
        torch.tensor([[-0.3, 0.5], [-8.5, 0.9], [0.2, -0.3], [-1.0, 1.0]], dtype=torch.float64),
    ],
    dim=1,
)


def operands(shape: tuple[int, ...], dtype: torch.dtype, m_dtype: torch.dtype, layout: str = "contiguous") -> dict:
    """Everything that a row of TABLE may read: after and m apart by some standard deviations, so that both matter."""
    names = {name: values(shape, k, dtype, layout) for k, name in enumerate(("after", "x", "h0", "h1", "h2", "h3"))}
    return {**names, "m": values(shape, 7, m_dtype, layout), "m2": values(shape, 8, m_dtype, layout)}


def doubled(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 7) -> Tensor:
    """A prediction with a variance beside the mean."""
    return values((shape[0], 2 * shape[1], *shape[2:]), seed, dtype, layout)


def without(given: dict, *names: str) -> dict:
    return {name: t for name, t in given.items() if name not in names}
