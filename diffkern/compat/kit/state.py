"""The state of a drop-in's loop, and what becomes of writes into it: a model's change nothing, a callback's count.

The model is given the state itself, which costs nothing; if that was written to (torch counts writes), the op that made
the state makes it again, and the model is given copies from then on. A state of 16 bits is float32 inside, so that
updates below half a unit add up; model and callback are given it rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern.compat.kit.rows import SIXTEEN, as_dtype


class State:
    """``value`` in the arithmetic's dtype, which stands for a state of ``dtype``; it starts from a copy."""

    def __init__(self, x: Tensor) -> None:
        self.dtype = x.dtype
        self.value = x.to(wider(x.dtype), copy=True)
        self.given = x
        """What the model was given last."""
        self._again: Callable[[], Tensor] = x.clone
        self._source: Any = None  # the model output that the value was made of
        self._counts = not torch.is_inference_mode_enabled()  # writes
        self._copies = not self._counts

    def call(self, model: Callable[[Tensor, int], Any], row: int) -> Any:
        """The model's output at the state."""
        value = self.value
        if self.dtype is not value.dtype or self._copies:
            self.given = value.to(self.dtype, copy=True)
            return model(self.given, row)
        self.given, writes = value, value._version
        m = model(value, row)
        if value._version != writes:
            self._copies = True
            self._refuse(m)
            self.value = self._again()
        return m

    def _refuse(self, m: Any) -> None:
        if isinstance(m, Tensor) and isinstance(self._source, Tensor) and overlap(m, self._source):
            raise ValueError(f"model {WRITES}")

    def show(self, seen: Callable[[Tensor], object], *, keep: bool) -> Tensor | None:
        """Give a callback the state, whose writes are in it then; with ``keep``, the value from before them."""
        before = self.value
        if self.dtype is not before.dtype:
            x = before.to(self.dtype)
            seen(x)
            self.value = merged(before, x)
        elif self._counts:
            writes = before._version
            seen(before)
            if keep and before._version != writes:
                before = self._again()
        else:
            before = before.clone() if keep else before
            seen(self.value)
        return before if keep else None

    def widen(self, dtype: torch.dtype) -> None:
        """The state has another dtype from here."""
        self.dtype, self.value = dtype, as_dtype(self.value, wider(dtype))

    def move(self, value: Tensor, again: Callable[[], Tensor], source: Any) -> None:
        """The next state; ``again`` makes it from the same operands, ``source`` among them."""
        self.value, self._again, self._source = value, again, source

    def end(self) -> Tensor:
        """The state in its dtype."""
        return as_dtype(self.value, self.dtype)


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the state of a loop has inside."""
    return torch.float32 if dtype in SIXTEEN else dtype


def merged(value: Tensor, x: Tensor) -> Tensor:
    """The value, element by element where x is what it rounds to; x where it is not."""
    return torch.where(value.to(x.dtype) == x, value, x)


def shifted(out: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """out + (after - before) where they differ."""
    return out if before is after else torch.where(before == after, out, out + (after - before))


WRITES = (
    "must write into its input from its first call on or never, or return a new tensor each time, got one that does "
    "neither: give it a copy of its input"
)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether both lie in one storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
