"""Valid calls of every op, at random: what the float64 reference says, and nothing written beside the outputs."""

from __future__ import annotations

import pytest
import torch
from helpers.fuzz_calls import CALLS, Call, run
from helpers.fuzzing import fuzz, guarded
from helpers.op_cases import LAYOUTS, native_draws
from hypothesis import strategies as st
from torch import Tensor

from diffkern import ops

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
# float64 tensors hold the float32 normals, which native_draws gives the reference too.
WIDE = {torch.float64: EPS[torch.float64]}
ROUNDINGS = 16
"""Of the arithmetic, in units of the largest sum of terms."""


def agrees(ours: Tensor, exact: Tensor, scale: float, inner: float, what: str) -> None:
    assert ours.shape == exact.shape, what
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), what
        return
    assert torch.equal(ours.isnan(), exact.isnan()), f"{what}: NaN in other places"
    most = torch.finfo(ours.dtype).max
    fits = exact.abs() < most
    error = (ours.double() - exact)[fits].nan_to_num().abs()
    allowed = EPS[ours.dtype] * (exact[fits].nan_to_num().abs() + inner)
    allowed = allowed + ROUNDINGS * WIDE.get(ours.dtype, EPS[torch.float32]) * scale
    if ours.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # half a subnormal
    worst = (error - allowed).max().item() if error.numel() else 0.0
    assert worst <= 0, f"{what}: off by {error.max().item():.3g} at a size of {scale:.3g}"


def test_every_op_is_here() -> None:
    assert set(CALLS) == set(ops.__all__)


@pytest.mark.parametrize("name", CALLS)
@fuzz(15, data=st.data())
def test_an_op_is_its_reference(name: str, data: st.DataObject) -> None:
    call = data.draw(CALLS[name])
    layout = data.draw(st.sampled_from(LAYOUTS))
    made = {key: guarded(shape, dtype, layout) for key, (shape, dtype) in call.outs.items()}
    before = {key: value.clone() for key, value in call.given.items() if isinstance(value, Tensor)}
    with native_draws():
        found = run(name, call.given, {key: out for key, (out, _) in made.items()})
        expected = call.expected()
    for key, (_, kept) in made.items():
        assert kept(), f"{name} wrote beside {key}"
    for key, value in before.items():
        assert torch.equal(call.given[key].nan_to_num(), value.nan_to_num()), f"{name} wrote into {key}"
    assert len(found) == len(expected)
    for i, (ours, exact) in enumerate(zip(found, expected, strict=True)):
        assert (ours is None) or exact is not None, f"{name}: result {i} was not asked for"
        if ours is not None and exact is not None:
            coarse = call.scale * (2.0**29 if ours.dtype == torch.float64 and _narrow(call) else 1.0)
            agrees(ours, exact, coarse, call.inner, f"{name}, result {i}")


def _narrow(call: Call) -> bool:
    """Whether a float64 result (the next input's dtype is free) comes from float32 arithmetic."""
    state = next((call.given[k] for k in ("x", "x0", "after") if isinstance(call.given.get(k), Tensor)), None)
    return state is not None and state.dtype != torch.float64
