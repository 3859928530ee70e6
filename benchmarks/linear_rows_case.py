"""The case of a linear layer row by row, beside F.linear: time embeddings and modulations of a run, or of one step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, loose, random_tensor, tight
from diffkern import ops, reference

__all__ = ["TABLE"]


def linear_rows(
    name: str,
    setting: Setting,
    shape: tuple[int, int, int],
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """SiLU and a product, as the projection of an embedding in a residual block. Shape: rows, inputs, outputs."""
    rows, inputs, outputs = shape
    x = random_tensor(0, (rows, inputs), setting, dtype)
    weight = (random_tensor(1, (outputs, inputs), setting) / inputs**0.5).to(dtype)
    bias = random_tensor(2, (1, outputs), setting, dtype)[0]

    def fused() -> torch.Tensor:
        return ops.linear_rows(x, weight, bias, act="silu")

    def eager() -> torch.Tensor:
        return F.linear(F.silu(x), weight, bias)

    def check() -> list[Check]:
        exact = reference.linear_rows(x.cpu(), weight.cpu(), bias.cpu(), act="silu")
        return [compare("ours", fused(), exact, tight(dtype)), compare("eager", eager(), exact, loose(dtype))]

    baselines = (Baseline("eager", eager, cpu_target(goal, setting)),)
    moved = bytes_of(x, weight, bias) + rows * outputs * x.element_size()
    return Case(
        name, "SiLU and a linear layer, row by row", shape, dtype, functools.partial(fused), baselines, check, moved
    )


BF16 = {"dtype": torch.bfloat16}
TABLE: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "linear-rows-1": (linear_rows, {"shape": (1, 1280, 1280)}),
    "linear-rows-16": (linear_rows, {"shape": (16, 512, 1024)}),
    "linear-rows-50": (linear_rows, {"shape": (50, 1280, 1280)}),
    "linear-rows-1000": (linear_rows, {"shape": (1000, 512, 512)}),
    "linear-rows-1-bf16": (linear_rows, {"shape": (1, 1280, 1280), **BF16}),
    "linear-rows-50-bf16": (linear_rows, {"shape": (50, 1280, 1280), **BF16}),
}
