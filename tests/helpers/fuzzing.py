"""How the fuzz tests run: how many examples, guard bytes around outputs, and which errors are clear sentences.

``DIFFKERN_FUZZ=N`` (`make fuzz`) takes N times the examples, different ones each time; without it they are always the
same few.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from helpers.op_cases import arrange

TIMES = int(os.environ.get("DIFFKERN_FUZZ", "0"))
"""How many times the examples of CI; 0: those, the same each time."""
GUARD = 67
"""Elements before and behind an output that must stay as they were."""
KINDS = (ValueError, TypeError, RuntimeError, NotImplementedError)
"""What bad input raises."""
ALIASES = ("prediction", "sampler", "time", "t", "steps", "beta", "betas")
"""What sentences call arguments that go by other names: ``source`` is a prediction, ``levels`` are steps ..."""
NO_SENTENCE = (
    *("INTERNAL ASSERT", "a call into libtorch failed", "has no attribute", "'NoneType' object", "please report a bug"),
    *("not subscriptable", "object is not", "Overflow when unpacking", "maximum recursion", "out of range"),
)
"""What no sentence of ours holds: another's error that came through."""


def fuzz(examples: int, **strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test of so many examples, in CI and `make test-long`."""

    def made(test: Callable[..., None]) -> Callable[..., None]:
        run = settings(
            max_examples=examples * max(1, TIMES),
            derandomize=not TIMES,
            database=None,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        )(given(**strategies)(test))
        marked: Callable[..., None] = pytest.mark.full(run)
        return marked

    return made


def guarded(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Callable[[], bool]]:
    """A tensor inside a larger buffer, and whether all around it is as it was."""
    like = arrange(torch.empty(shape), "permuted" if layout == "expanded" else layout)
    strides = like.stride()
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
    buffer = torch.full((last + 1 + 2 * GUARD,), -7.0, dtype=dtype)
    out = buffer.as_strided(shape, strides, GUARD)
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    inside.as_strided(shape, strides, GUARD).fill_(True)

    def kept() -> bool:
        return bool((buffer[~inside] == -7.0).all())

    return out, kept


def is_sentence(error: BaseException, names: Iterable[str]) -> bool:
    """Whether an error says what was wrong: of the right kind, beginning with ours or naming one of ``names``."""
    text = str(error).strip()
    if type(error) not in KINDS or any(part in text for part in NO_SENTENCE):
        return False
    first = text.split("\n")[0]
    ours = re.match(r"diffkern[.:]|Could not run 'diffkern::|diffkern::", first) is not None
    return ours or any(re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", first) for name in names)


def check_refusal(error: BaseException, function: Callable[..., Any], what: object) -> None:
    """Fails, with the error as its cause, unless it is a sentence about an argument of ``function``."""
    names = [*inspect.signature(function).parameters, getattr(function, "__name__", "?"), *ALIASES]
    if not is_sentence(error, names):
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]} of {what}") from error
