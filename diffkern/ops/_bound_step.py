"""The step with its table bound once: for loops in which microseconds count and no gradient is recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.ops._common import native, refuse_tangents
from diffkern.ops._seeds import Seeds, numbered


class Stepped(NamedTuple):
    """What a bound step returns: the results of `step`, by name."""

    out: Tensor
    """The new state x', [B, ...]."""
    x0: Tensor | None
    """The estimate of the clean sample, with ``want_x0``."""
    s: Tensor | None
    """The second output, with ``want_s``."""
    next: Tensor | None
    """k x', the next model input, with ``next_copies``."""


class BoundStep(Protocol):
    """Row ``row`` of the bound table (or ``index``); operands as for `step`."""

    def __call__(
        self,
        x: Tensor | None,
        m: Tensor | None,
        row: int,
        *,
        m2: Tensor | None = None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
        h3: Tensor | None = None,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Seeds | None = None,
    ) -> Stepped: ...


class BoundStepOut(Protocol):
    """Row ``row`` of the bound table (or ``index``) into ``out``, ``x0``, ``s`` and ``next``; as `step_out`."""

    def __call__(
        self,
        x: Tensor | None,
        m: Tensor | None,
        row: int,
        *,
        out: Tensor,
        x0: Tensor | None = None,
        s: Tensor | None = None,
        next: Tensor | None = None,
        m2: Tensor | None = None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
        h3: Tensor | None = None,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Seeds | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None: ...


_step: Callable[..., Any] = native.step.default
_step_out: Callable[..., Any] = native.step_out.default
_named = tuple.__new__  # Stepped(*found) unpacks and packs again


def bound_step(
    table: Tensor,
    *,
    want_x0: bool = False,
    want_s: bool = False,
    next_copies: int = 0,
    next_dtype: torch.dtype | None = None,
) -> BoundStep:
    """`step` on a fixed table, with fixed outputs: ``bound(x, m, row)`` returns a `Stepped`.

    Not differentiable, and it does not look: the caller knows that no operand requires grad. An index outside the
    table gives NaN on CUDA, also with DIFFKERN_CHECK=1. Raises NotImplementedError for an operand with a tangent.
    """
    wants = (want_x0, want_s, next_copies, next_dtype)
    few = _given(wants, (False, False, 0, None))

    # Keyword-only for type checkers alone: Python fills the defaults of such arguments one by one.
    def step(
        x: Tensor | None,
        m: Tensor | None,
        row: int,
        m2: Tensor | None = None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
        h3: Tensor | None = None,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Seeds | None = None,
    ) -> Stepped:
        if forward_ad._current_level >= 0:
            refuse_tangents("step", x, m, m2, h0, h1, h2, h3, noise)
        args: tuple[Any, ...]
        if index is noise is seeds is None:
            if h2 is h3 is None:
                args = few if m2 is h0 is h1 is None else (*wants, m2, h0, h1)
            else:
                args = (*wants, m2, h0, h1, h2, h3)
        else:
            if seeds is not None and not isinstance(seeds, Tensor):
                seeds = numbered(seeds, x, h0, h1, h2, h3, noise, m)
            args = (*wants, m2, h0, h1, h2, h3, index, seeds, noise)
        return _named(Stepped, _step(x, m, table, row, *args))

    return step


def _given(values: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values up to the last that is not its default: what is left out costs nothing."""
    given = [i for i, (value, default) in enumerate(zip(values, defaults, strict=True)) if value != default]
    return values[: given[-1] + 1] if given else ()


def bound_step_out(table: Tensor) -> BoundStepOut:
    """`step_out` on a fixed table: ``bound(x, m, row, out=...)``; what `bound_step` does not look at, this does not.

    It tells autograd nothing of what it writes: the tensors written must be the caller's own.
    """

    def step_out(
        x: Tensor | None,
        m: Tensor | None,
        row: int,
        *,
        out: Tensor,
        x0: Tensor | None = None,
        s: Tensor | None = None,
        next: Tensor | None = None,
        m2: Tensor | None = None,
        h0: Tensor | None = None,
        h1: Tensor | None = None,
        h2: Tensor | None = None,
        h3: Tensor | None = None,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Seeds | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
    ) -> None:
        if forward_ad._current_level >= 0:
            refuse_tangents("step", x, m, m2, h0, h1, h2, h3, noise, known)
        if out is None:  # pays less than a look at the error
            raise RuntimeError("diffkern.step: out must be a tensor, got None")
        if seeds is not None and not isinstance(seeds, Tensor):
            seeds = numbered(seeds, out)
        args: tuple[Any, ...] = (x, m, table, row, out, x0, s, next, m2, h0, h1)
        if not (index is seeds is noise is mask is known is h2 is h3 is None):
            args += (h2, h3, index, seeds, noise, mask, known)
        _step_out(*args)

    return step_out
