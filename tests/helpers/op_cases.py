"""Shapes, memory layouts and rows that the tests of the ops share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from diffkern import ops, reference
from diffkern.plan import COLUMNS

# A block of the kernels is 1024 elements: one less, one more, primes, 1, nothing, 1-D to 5-D, C up to and past 16.
SHAPES: list[tuple[int, ...]] = [
    (0, 3),
    (2, 0, 3, 2),
    (1, 1),
    (5,),
    (3, 1023),
    (2, 1025),
    (1, 4099),
    (2, 3, 19, 23),
    (3, 4, 16, 17),
    (2, 17, 7, 11),
    (2, 3, 5, 7, 11),
]
LAYOUTS = ["contiguous", "channels_last", "permuted", "sliced", "expanded"]


def arrange(x: Tensor, layout: str) -> Tensor:
    """The values of x (repeated along dimensions for "expanded") in another memory layout."""
    if layout == "contiguous" or x.dim() < 2:
        return x.contiguous()
    if layout == "channels_last":  # [B, C, ...] stored as [B, ..., C]
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "permuted":  # stored back to front
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":  # every second element of a larger tensor
        wide = x.new_zeros((x.shape[0] + 1, *x.shape[1:-1], 2 * x.shape[-1] + 1))
        view = wide[1:, ..., 1::2]
        view.copy_(x)
        return view
    assert layout == "expanded"
    return x[..., :1].expand(x.shape) if x.shape[-1] else x


def values(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Arbitrary numbers, from torch's own generator."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return arrange(x.to(dtype), layout)


def table(*rows: dict[str, float]) -> Tensor:
    """A table for `step` from named coefficients; clip is inf and k is 1 unless given."""
    defaults = {"clip": math.inf, "k": 1.0}
    return torch.tensor([[{**defaults, **row}.get(name, 0.0) for name in COLUMNS] for row in rows], dtype=torch.float64)


FROM_EPS = {"p": 1.25, "q": -0.75, "b": 0.875, "d": 0.5}
FROM_X0 = {"p": 1.25, "q": -0.75, "a": 0.625, "b": 0.375}
EULER = {"a": 1.0, "d": -0.0371}
NOISE = {"g": 0.3, "stream": 2.0**41 + 5}
CLIP = {"clip": 1.0}
SLOPE = {"A": 0.7, "B": -0.2, "D": 1.3}
EVERYTHING = {
    **{"w": 3.5, "p": 1.1, "q": -0.9, "r": 0.2, "clip": 1.5, "a": 0.6, "b": 0.4, "d": 0.3, "e0": 0.1, "e1": -0.2},
    **{"e2": 0.15, "e3": -0.25, "g": 0.5, "k": 0.8, "known_s": 0.9, "known_n": 0.43, "known_stream": 3.0 * 2**40 + 1},
    **{"stream": 2.0**41 + 9},
    **SLOPE,
}
# Every row with a loop of its own in csrc/cpu (test_step.py compares the lists), and others.
ROWS: dict[str, dict[str, float]] = {
    "eps": FROM_EPS,
    "eps clip": {**FROM_EPS, **CLIP},
    "eps guided": {**FROM_EPS, "w": 2.5},
    "eps noise": {**FROM_EPS, **NOISE},
    "x0": FROM_X0,
    "x0 clip": {**FROM_X0, **CLIP},
    "x0 noise": {**FROM_X0, **NOISE},
    "x0 clip noise": {**FROM_X0, **CLIP, **NOISE},
    "eps and x": {**FROM_EPS, "a": 0.25},
    "x0 alone": {"p": 1.25, "q": -0.75, "b": 0.9},
    "x0 history": {**FROM_X0, "e0": -0.4},
    "slope": {**EULER, "A": 0.7, "D": 1.3, "k": 0.9},
    "slope of m": {**EULER, "D": 1.3},
    "slope of m and x0": {**EULER, "p": 1.25, "q": -0.75, "D": 1.3},
    "m and x0": {"d": 0.3, "p": 1.25, "q": -0.75},
    "x alone": {"a": 0.9, "k": 1.1},
    "slope of m alone": {"d": 0.3, "D": 1.3},
    "history 2 noise": {**EULER, "e1": 0.5, "e3": -0.25, **NOISE},
    "history 3 noise": {"d": 0.3, "e0": 0.5, "e1": -0.25, "e2": 0.125, **NOISE, "D": 1.0},
    "slope of x0 clip": {**FROM_X0, **CLIP, "A": 0.7, "B": -0.6},
    "history": {"d": 0.3, "e0": 0.7, "k": 1.1},
    "history and x": {**EULER, "e0": 0.5},
    "model alone": {"d": 1.3},
    "x0 alone clip": {"p": 1.25, "q": -0.75, "b": 0.9, **CLIP},
    "euler": EULER,
    "euler noise": {**EULER, **NOISE},
    "euler guided": {**EULER, "w": 7.5},
    "history 1": {**EULER, "e0": 0.5, **SLOPE},
    "history 4": {"a": 0.5, "e0": 0.1, "e1": -0.2, "e2": 0.3, "e3": -0.4, "k": 0.5},
    "noise before clip": {**FROM_X0, **CLIP, "r": 0.25, "stream": 7.0},
    "nothing": {"k": 2.0},
    "everything": EVERYTHING,
}


@contextmanager
def native_draws() -> Iterator[None]:
    """The reference with the native noise, which test_noise.py checks: then only the arithmetic is compared."""

    def randn(shape: tuple[int, ...], seeds: Tensor, stream: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
        return ops.randn(list(shape), seeds, stream, dtype=torch.float64).to(dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "randn", randn)
        yield


@contextmanager
def threads(n: int) -> Iterator[None]:
    """torch's thread count within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit (NaN equals the same NaN, 0 is not -0)."""
    ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    a, b = a.detach().contiguous(), b.detach().contiguous()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return (
        torch.equal(a.view(ints[a.element_size()]), b.view(ints[b.element_size()]))
        if a.dim()
        else same_bits(a[None], b[None])
    )


def check_sentence(call: Callable[[], object], sentence: str) -> None:
    """The call raises, and the first line of what it says matches."""
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as caught:
        call()
    text = str(caught.value).splitlines()[0]
    assert re.search(sentence, text), text
