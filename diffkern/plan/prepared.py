"""What a model knows of the rows of a plan beforehand, asked for once a run.

A model whose class has ``sampling_rows(times, cond, batch)`` may give a function of (i, x, t, cond) that is the model
at ``times[i]``, bit for bit (`diffkern.nn.UNet` computes what times and condition decide for all rows at once); None
where it must be called as ever. Models without are called as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.modes import real

MOST = 16
"""Conditions of a run of which rows are kept."""
Rows = Callable[[int, Tensor, Tensor, Any], Tensor]


class Prepared:
    """The calls of one run: ``call(model, i, x, t, cond)`` is the model's, prepared where it can be."""

    def __init__(self, times: Tensor, prepare: bool, first: int = 0) -> None:
        """``times``: what the model is given at each row, on the device of the state; ``first``: where it begins."""
        self._times, self._begin = times[first:], first
        self._prepares = prepare and real(times) and torch._C._functorch.peek_interpreter_stack() is None
        self._rows: dict[tuple[int, int, int], tuple[Any, Any, Rows | None]] = {}

    def call(self, model: Any, i: int, x: Tensor, t: Tensor, cond: Any) -> Any:
        """The model's output at row i."""
        rows = self._of(model, cond, x.shape[0]) if self._prepares else None
        if rows is not None:
            return rows(i - self._begin, x, t, cond)
        return model(x, t) if cond is None else model(x, t, cond)

    def _of(self, model: Any, cond: Any, batch: int) -> Rows | None:
        """Of a model, condition and batch, all of which are kept so that their addresses stay theirs."""
        offer = getattr(type(model), "sampling_rows", None)
        if offer is None or batch == 0:
            return None
        key = id(model), id(cond), batch
        if key not in self._rows:
            if len(self._rows) >= MOST:  # each call brings a condition of its own
                self._prepares = False
                return None
            try:
                rows = offer(model, self._times, cond, batch)
            except ValueError:  # which the call itself will say, of the batch that it is given
                rows = None
            self._rows[key] = model, cond, rows
        return self._rows[key][2]
