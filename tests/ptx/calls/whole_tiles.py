"""One call of every op whose sizes are whole tiles: what the report measures, and what must reach the minimum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ptx.calls.learned_step import ROWS as LEARNED_ROWS
from ptx.calls.learned_step import learned_step
from ptx.calls.loss import loss
from ptx.calls.noise_sum import noise_sum
from ptx.calls.noising import noising
from ptx.calls.randn import randn
from ptx.calls.step import ROWS, step, wanted
from ptx.calls.step_logprob import ROWS as DENSITY_ROWS
from ptx.calls.step_logprob import density
from ptx.calls.variational import variational
from ptx.harness import Call, with_changes

SHAPE = (3, 32, 64)  # a multiple of every tile
BATCH = 2
Shape = tuple[int, ...]


def _everything(layout: str, shape: Shape, dtype: torch.dtype) -> Call:
    outputs = wanted(dtype, dtype, 2)
    return step(layout, BATCH, shape, dtype, ROWS["everything"], mask_dtype=dtype, outputs=outputs)


def _from_table(layout: str, shape: Shape, dtype: torch.dtype) -> Call:
    call = step(layout, BATCH, shape, dtype, ROWS["ddpm"])
    return with_changes(call, row=None, table=torch.tensor([ROWS["ddpm"]], dtype=torch.float64))


def _loss(layout: str, shape: Shape, dtype: torch.dtype) -> Call:
    return with_changes(loss(layout, BATCH, shape, dtype), index=torch.tensor([0, 3]))  # rows without zeros


def _learned_density(layout: str, shape: Shape, dtype: torch.dtype) -> Call:
    """A row for each sample from the table, without the histories, which no row of a learned variance reads."""
    call = density(layout, BATCH, shape, dtype, learned=True)
    return with_changes(call, inputs={name: t for name, t in call.inputs.items() if not name.startswith("h")})


CASES: dict[str, Callable[[str, Shape, torch.dtype], Call]] = {
    "randn": lambda layout, shape, dtype: randn(layout, BATCH, shape, dtype),
    "noise_sum": lambda layout, shape, dtype: noise_sum(layout, BATCH, shape, dtype, n=3),
    "noising": lambda layout, shape, dtype: noising(layout, BATCH, shape, dtype),
    "noising, noise tensor": lambda layout, shape, dtype: noising(layout, BATCH, shape, dtype, tensor_noise=True),
    "step ddim": lambda layout, shape, dtype: step(layout, BATCH, shape, dtype, ROWS["ddim"]),
    "step ddpm": lambda layout, shape, dtype: step(layout, BATCH, shape, dtype, ROWS["ddpm"]),
    "step everything": _everything,
    "learned step": lambda layout, shape, dtype: learned_step(layout, BATCH, shape, dtype, LEARNED_ROWS["clip"]),
    "loss": _loss,
    "variational": lambda layout, shape, dtype: variational(layout, BATCH, shape, dtype),
    "step_logprob": lambda layout, shape, dtype: density(layout, BATCH, shape, dtype, DENSITY_ROWS["everything"]),
    "step_logprob learned": _learned_density,
    "step ddpm, table": _from_table,
}


def cases(dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Call]:
    return {name: case(layout, SHAPE, dtype) for name, case in CASES.items()}
