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


# What the overload calls: without its frame of Python, which pays for that of the bound step. torch.compile, which
# knows the overload alone, is given that.
_step: Callable[..., Any] = native.step.default._op
_step_out: Callable[..., Any] = native.step_out.default._op
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
    copies, dtype = next_copies, next_dtype

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
        if seeds is not None and not isinstance(seeds, Tensor):
            seeds = numbered(seeds, x, h0, h1, h2, h3, noise, m)
        args = (x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, None, None, want_x0, want_s, copies, dtype)
        if torch.compiler.is_compiling():
            return Stepped(*native.step.default(*args))
        return _named(Stepped, _step(*args))

    return step


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
        args = (x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, mask, known, out, x0, s, next)
        if torch.compiler.is_compiling():
            native.step_out.default(*args)
        else:
            _step_out(*args)

    return step_out
