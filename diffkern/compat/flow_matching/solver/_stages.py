"""Explicit stages as rows: y + h sum_i w_i k_i over a state and the slopes found so far, in one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.kit.rows import AT, promote, table_of
from diffkern.modes import neutrally
from diffkern.plan import SLOTS

State = tuple[Tensor, ...]
"""What is integrated: the samples [B, ...], and in a likelihood the integral of their divergence [B]."""
Field = Callable[[Tensor, State], State]
"""(0-dim time, state) -> the derivatives of its parts."""


class Stage(NamedTuple):
    """Which older slopes a stage reads, whether later stages read its own, whether it ends the step."""

    reads: tuple[int, ...]
    kept: bool
    ends: bool


class Stages(NamedTuple):
    """Stage i makes y + h sum_j weights[i][j] k_j once k_i is known."""

    nodes: tuple[float, ...]
    """Where the slopes are taken, in units of the step."""
    stages: tuple[Stage, ...]
    unit: Tensor
    """[S, 21], the parts of the rows that are multiplied by h."""
    base: Tensor
    """[S, 21], those that are not."""

    def rows(self, h: Tensor) -> Tensor:
        """[N, S, 21] for steps h [N] float64."""
        return self.base + h[:, None, None] * self.unit


@neutrally
def stages_of(nodes: tuple[float, ...], weights: Sequence[tuple[float, ...]]) -> Stages:
    """From the nodes c and one tuple of weights a stage: those of the method's stages and then of its step."""
    base = table_of(len(weights), a=1.0, D=1.0)
    unit = torch.zeros_like(base)
    found = []
    for i, row in enumerate(weights):
        reads = tuple(j for j, w in enumerate(row[:-1]) if w != 0.0)
        assert len(reads) <= SLOTS
        unit[i, AT["d"]] = row[-1]
        for slot, j in enumerate(reads):
            unit[i, AT[f"e{slot}"]] = row[j]
        kept = any(len(later) > i + 1 and later[i] != 0.0 for later in weights[i + 1 :])
        found.append(Stage(reads, kept, i + 1 == len(weights)))
    return Stages(nodes, tuple(found), unit, base)


def run_stage(stage: Stage, y: State, ks: list[State], m: State, table: Tensor, row: int) -> tuple[State, State]:
    """(the next stage's state or the step's end, the slope as later stages read it).

    The field reads the samples alone: the other parts are advanced at the step's end.
    """
    if len(y) == 1 and y[0].dtype == m[0].dtype:  # the common case, without the loop's bookkeeping
        histories = [ks[j][0] for j in stage.reads]
        return (ops.step(y[0], m[0], None, *histories, table=table, row=row)[0],), m
    out, kept = [], []
    for part, (base, slope) in enumerate(zip(y, m, strict=True)):
        narrow = stage.kept and slope.dtype != base.dtype
        if part and not stage.ends:
            out.append(base)
            kept.append(slope.to(base.dtype))
            continue
        older = [ks[j][part] for j in stage.reads]
        new, _, s, _ = ops.step(base, slope, None, *older, table=table, row=row, want_s=narrow)
        out.append(new)
        kept.append(slope if s is None else s)
    return tuple(out), tuple(kept)


def fitted(y: State, ks: list[State], m: State) -> tuple[State, list[State], State]:
    """State and slopes in the shape and dtype that plain torch would give: a wider slope widens the state."""
    for base, slope in zip(y, m, strict=True):
        if not isinstance(slope, Tensor):
            raise TypeError(f"velocity_model must return a tensor, got {type(slope).__name__}")
        if slope.dtype != base.dtype or slope.shape != base.shape:
            break
    else:
        return y, ks, m
    wide = [promote(base.dtype, slope.dtype) for base, slope in zip(y, m, strict=True)]
    y = tuple(base.to(dtype) for base, dtype in zip(y, wide, strict=True))
    ks = [tuple(k.to(dtype) for k, dtype in zip(old, wide, strict=True)) for old in ks]
    return y, ks, tuple(torch.broadcast_to(slope, base.shape) for base, slope in zip(y, m, strict=True))


def copied(x: Tensor) -> Tensor:
    """A copy for a model that may write into it, which asks for a gradient as x does."""
    copy = x.clone()
    return copy.requires_grad_() if x.requires_grad and not copy.requires_grad else copy
