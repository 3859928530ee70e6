"""The step with its table bound: the ops themselves, every operand in its place and every result by its name."""

from __future__ import annotations

import pytest
import torch
from helpers.op_cases import EVERYTHING, table, values
from torch import Tensor

from diffkern import ops

SHAPE = (3, 4, 5)
NAMES = ("x", "h0", "h1", "h2", "h3", "m", "m2")


def operands(**more: Tensor) -> dict[str, Tensor]:
    """Every operand with values of its own."""
    return {**{name: values(SHAPE, k, torch.float32) for k, name in enumerate(NAMES)}, **more}


def same(got: Tensor | None, want: Tensor | None) -> bool:
    return got is not None and want is not None and torch.equal(got, want)


@pytest.mark.parametrize("noise", ["seeds", "noise"])
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, 1])])
def test_every_operand_of_a_bound_step_stands_in_its_place(noise: str, index: Tensor | None) -> None:
    given = {"seeds": torch.tensor([4, 5, 6]), "noise": values(SHAPE, 9, torch.float32)}
    inputs = operands(**{noise: given[noise]})
    rows = table(EVERYTHING, EVERYTHING)
    wants = {"want_x0": True, "want_s": True, "next_copies": 2, "next_dtype": torch.bfloat16}
    want = ops.step(**inputs, table=rows, row=1, index=index, **wants)
    x, m = inputs.pop("x"), inputs.pop("m")
    got = ops.bound_step(rows, **wants)(x, m, 1, index=index, **inputs)
    for name, found, expected in zip(("out", "x0", "s", "next"), got, want, strict=True):
        assert getattr(got, name) is found
        assert same(found, expected), name


def test_a_bound_step_gives_none_for_what_was_not_asked_for() -> None:
    x, m = values(SHAPE, 0, torch.float32), values(SHAPE, 1, torch.float32)
    rows = table(EVERYTHING)
    rest = {f"h{k}": values(SHAPE, 2 + k, torch.float32) for k in range(4)}
    rest |= {"m2": values(SHAPE, 8, torch.float32), "noise": values(SHAPE, 9, torch.float32)}
    got = ops.bound_step(rows)(x, m, 0, **rest)
    assert got.x0 is got.s is got.next is None
    assert torch.equal(got.out, ops.step(x, m, table=rows, **rest)[0])


def test_every_operand_of_a_bound_step_out_stands_in_its_place() -> None:
    inputs = operands(
        seeds=torch.tensor([4, 5, 6]),
        noise=values(SHAPE, 9, torch.float32),
        mask=torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)),
        known=values(SHAPE, 10, torch.float32),
    )
    rows = table(EVERYTHING, EVERYTHING)
    want = {name: torch.zeros(SHAPE) for name in ("out", "x0", "s", "next")}
    got = {name: torch.ones(SHAPE) for name in want}
    index = torch.tensor([1, 0, 1])
    ops.step_out(**inputs, table=rows, index=index, **want)
    x, m = inputs.pop("x"), inputs.pop("m")
    ops.bound_step_out(rows)(x, m, 0, index=index, **inputs, **got)
    for name, expected in want.items():
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("seeds", [None, 3, torch.tensor([4, 5, 6])], ids=str)
def test_a_bound_step_needs_a_tensor_to_write(seeds: int | Tensor | None) -> None:
    x = values(SHAPE, 0, torch.float32)
    with pytest.raises(RuntimeError, match=r"^diffkern\.step: out must be a tensor, got None$"):
        ops.bound_step_out(table({"a": 0.9, "g": 0.1}))(x, x, 0, out=None, seeds=seeds)  # type: ignore[arg-type]


@pytest.mark.full
def test_a_bound_step_is_traced_whole() -> None:
    step = ops.bound_step(table({"a": 0.9, "b": 0.2, "p": 1.1, "q": -0.4}), want_x0=True)
    x, m = values(SHAPE, 0, torch.float32), values(SHAPE, 1, torch.float32)
    got = torch.compile(lambda x, m: step(x, m, 0), fullgraph=True, backend="aot_eager")(x, m)
    want = step(x, m, 0)
    assert same(got.out, want.out)
    assert same(got.x0, want.x0)
