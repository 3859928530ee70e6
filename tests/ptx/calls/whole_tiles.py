"""One call of every op whose sizes are whole tiles: what the report measures, and what must reach the minimum."""

from __future__ import annotations

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
from ptx.harness import Call

SHAPE = (3, 32, 64)  # a multiple of every tile
BATCH = 2


def cases(dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Call]:
    everything = step(
        layout, BATCH, SHAPE, dtype, ROWS["everything"], mask_dtype=dtype, outputs=wanted(dtype, dtype, 2)
    )
    table = torch.tensor([ROWS["ddpm"]], dtype=torch.float64)
    ddpm = step(layout, BATCH, SHAPE, dtype, ROWS["ddpm"])
    everything_learned = loss(layout, BATCH, SHAPE, dtype)
    everything_learned.index = torch.tensor([0, 3])  # rows without zeros
    calls = {
        "randn": randn(layout, BATCH, SHAPE, dtype),
        "noise_sum": noise_sum(layout, BATCH, SHAPE, dtype, n=3),
        "noising": noising(layout, BATCH, SHAPE, dtype),
        "noising, noise tensor": noising(layout, BATCH, SHAPE, dtype, tensor_noise=True),
        "step ddim": step(layout, BATCH, SHAPE, dtype, ROWS["ddim"]),
        "step ddpm": ddpm,
        "step everything": everything,
        "learned step": learned_step(layout, BATCH, SHAPE, dtype, LEARNED_ROWS["clip"]),
        "loss": everything_learned,
        "variational": variational(layout, BATCH, SHAPE, dtype),
        "step_logprob": density(layout, BATCH, SHAPE, dtype, DENSITY_ROWS["everything"]),
        "step_logprob learned": learned_density(layout, dtype),
    }
    ddpm_table = step(layout, BATCH, SHAPE, dtype, ROWS["ddpm"])
    ddpm_table.row, ddpm_table.table = None, table
    calls["step ddpm, table"] = ddpm_table
    return calls


def learned_density(layout: str, dtype: torch.dtype) -> Call:
    """A row for each sample from the table, without the histories, which no row of a learned variance reads."""
    call = density(layout, BATCH, SHAPE, dtype, learned=True)
    call.inputs = {name: tensor for name, tensor in call.inputs.items() if not name.startswith("h")}
    return call
