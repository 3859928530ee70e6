"""linear_rows: the formula in every dtype, and rows whose bits know nothing of each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.op_cases import check_sentence, same_bits, threads, values
from helpers.tolerances import STATE_DTYPES
from torch import Tensor

from diffkern import ops, reference

# rows, inputs, outputs: fewer than lanes and tiles, whole ones, rests of each, several blocks of rows and of inputs
CASES = [(1, 1, 1), (2, 15, 3), (3, 16, 8), (25, 67, 21), (49, 530, 9), (5, 1024, 16)]
dtypes = pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = values((outputs, inputs), 2) / math.sqrt(inputs)
    return values((rows, inputs), 1, dtype), weight.to(dtype), values((1, outputs), 3, dtype)[0]


@dtypes
def test_value(dtype: torch.dtype) -> None:
    """Within one rounding of the dtype, and that of 16 sums of every 16th product, by the size of what is added up."""
    for k, case in enumerate(CASES):
        x, weight, bias = operands(*case, dtype)
        for act, b in (("silu", bias), (None, bias if k % 2 else None)):
            got, exact = ops.linear_rows(x, weight, b, act=act), reference.linear_rows(x, weight, b, act=act)
            size = reference.linear_rows(x.abs(), weight.abs(), None if b is None else b.abs()) + 1e-30
            wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
            limit = torch.finfo(dtype).eps * exact.abs() + wide * (8 + case[1] / 16) * size
            assert got.dtype == dtype
            assert ((got.double() - exact).abs() <= limit).all(), (case, act)


def test_whole_numbers_are_exact() -> None:
    """Sums below 2^24 have no rounding: the order is no excuse for a product that is missing or there twice."""
    for rows, inputs, outputs in CASES:
        x = torch.arange(rows * inputs).reshape(rows, inputs).remainder(7).sub(3).float()
        weight = torch.arange(outputs * inputs).reshape(outputs, inputs).remainder(11).sub(5).float()
        bias = torch.arange(outputs).float()
        want = (x.long() @ weight.long().t() + bias.long()).float()
        assert torch.equal(ops.linear_rows(x, weight, bias), want)
        assert torch.equal(ops.linear_rows(x.bfloat16(), weight.bfloat16(), bias.bfloat16()), want.bfloat16())


@dtypes
def test_a_row_has_its_bits_alone_and_among_others_at_any_place_and_thread_count(dtype: torch.dtype) -> None:
    x, weight, bias = operands(101, 530, 83, dtype)
    whole = ops.linear_rows(x, weight, bias, act="silu")
    for n in (1, 2, 3):
        with threads(n):
            assert same_bits(ops.linear_rows(x, weight, bias, act="silu"), whole)
            for begin, end in ((0, 1), (100, 101), (3, 5), (7, 20), (1, 98)):
                assert same_bits(ops.linear_rows(x[begin:end], weight, bias, act="silu"), whole[begin:end])
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    assert same_bits(ops.linear_rows(x[order], weight, bias, act="silu"), whole[order])
    assert same_bits(ops.linear_rows(x, weight[40:], bias[40:], act="silu"), whole[:, 40:])
    assert same_bits(ops.linear_rows(x[5:6].expand(3, -1), weight, bias, act="silu"), whole[5].expand(3, -1))


def test_the_order_of_the_sum() -> None:
    """Lane j has every 16th product; lanes j and j + 8 first, then + 4, + 2, + 1: told by what float32 forgets."""
    big, weight = 2.0**25, torch.ones(1, 35)

    def total(**at: float) -> float:
        x = torch.zeros(1, 35)
        for place, value in at.items():
            x[0, int(place[1:])] = value
        return ops.linear_rows(x, weight).item()

    assert total(k0=big, k16=1.0, k32=-big) == 0.0  # one lane, in turn: the 1 is lost
    assert total(k0=big, k1=1.0, k16=-big) == 1.0  # another lane keeps it
    assert total(k0=big, k8=1.0, k4=-big) == 0.0  # 0 and 8 first
    assert total(k0=big, k4=1.0, k8=-big) == 1.0
    assert total(k0=big, k4=1.0, k2=-big) == 0.0  # then 4, before 2
    assert total(k0=big, k2=1.0, k4=-big) == 1.0
    assert total(k0=big, k2=1.0, k1=-big) == 0.0  # 1 is the last


@dtypes
def test_any_strides_and_leading_dimensions(dtype: torch.dtype) -> None:
    x, weight, bias = operands(12, 20, 6, dtype)
    want = ops.linear_rows(x, weight, bias)
    padded, turned = torch.cat([x, x], 1)[:, :20], x.t().contiguous().t()
    for given in (padded, turned):
        for w in (torch.cat([weight, weight], 1)[:, :20], weight.t().contiguous().t()):
            assert same_bits(ops.linear_rows(given, w, torch.stack([bias, bias], 1)[:, 1]), want)
    assert same_bits(ops.linear_rows(x.reshape(2, 3, 2, 20), weight, bias), want.reshape(2, 3, 2, 6))
    assert same_bits(ops.linear_rows(x[4], weight, bias), want[4])


def test_nan_stays_in_its_row_and_column() -> None:
    x, weight, bias = operands(5, 40, 9, torch.float32)
    for bad in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[2, 33] = bad
        y = ops.linear_rows(spoilt, weight, bias)
        assert not y[2].isfinite().any()
        assert y[[0, 1, 3, 4]].isfinite().all()
    spoilt = weight.clone()
    spoilt[4, 0] = math.nan
    y = ops.linear_rows(x, spoilt, bias)
    assert y[:, 4].isnan().all()
    assert y.isnan().sum() == 5


def test_nothing_to_add_up() -> None:
    weight, bias = torch.ones(3, 4), torch.tensor([1.0, 2.0, 3.0])
    assert ops.linear_rows(torch.zeros(0, 4), weight, bias).shape == (0, 3)
    assert ops.linear_rows(torch.zeros(2, 0, 4), weight, bias).shape == (2, 0, 3)
    assert ops.linear_rows(torch.zeros(2, 4), weight[:0], bias[:0]).shape == (2, 0)
    for act in ("silu", None):
        assert ops.linear_rows(torch.zeros(2, 0), weight[:, :0], bias, act=act).tolist() == [[1.0, 2.0, 3.0]] * 2
        assert ops.linear_rows(torch.zeros(2, 3, 0), weight[:, :0], act=act).eq(0).all()


# ------------------------------------------------------------------------------------------------------- gradients
def test_gradcheck_twice() -> None:
    given = tuple(t.requires_grad_() for t in operands(2, 3, 2, torch.float64))
    for act in ("silu", None):
        function = lambda x, w, b, act=act: ops.linear_rows(x, w, b, act=act)  # noqa: E731
        assert torch.autograd.gradcheck(function, given)
        assert torch.autograd.gradgradcheck(function, given)


@dtypes
def test_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    given = [t.requires_grad_() for t in operands(6, 18, 7, dtype)]
    grad = values((6, 7), 9, dtype)
    got = torch.autograd.grad(ops.linear_rows(*given, act="silu"), given, grad)
    exact = torch.autograd.grad(reference.linear_rows(*given, act="silu"), given, grad.double())
    tolerance = 32 * torch.finfo(dtype).eps
    for g, e in zip(got, exact, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e.double(), rtol=tolerance, atol=tolerance)


def test_the_gradient_of_part_of_the_operands() -> None:
    x, weight, bias = operands(3, 5, 4, torch.float32)
    alone = torch.autograd.grad(ops.linear_rows(x, weight, bias.requires_grad_()).sum(), bias)[0]
    assert alone.tolist() == [3.0] * 4
    y = ops.linear_rows(x.requires_grad_(), weight)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones(3, 4) @ weight)


def test_autocast_casts_as_a_linear_layer_does() -> None:
    x, weight, bias = operands(3, 5, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.linear_rows(x, weight, bias)
        assert got.dtype == F.linear(x, weight, bias).dtype == torch.bfloat16
    assert same_bits(got, ops.linear_rows(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


# ------------------------------------------------------------------------------------------------- compile, bad input
@pytest.mark.full
def test_compile_and_export() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear_rows(x * 2, w, b, act="silu") + 1

    args = operands(6, 20, 7, torch.float32)
    leaves = [t.clone().requires_grad_() for t in args]
    compiled = torch.compile(function, fullgraph=True)(*leaves)
    assert same_bits(compiled, function(*args))
    for a, b in zip(
        torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(function(*leaves).sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return function(x, w, b)

    shapes = ({0: torch.export.Dim("rows", min=2, max=64)}, None, None)
    exported = torch.export.export(Module(), args, dynamic_shapes=shapes)
    more = (values((11, 20), 5), *args[1:])
    assert same_bits(exported.module()(*more), function(*more))


def test_bad_input() -> None:
    x, weight, bias = torch.ones(3, 4), torch.ones(5, 4), torch.ones(5)
    run = ops.linear_rows
    with pytest.raises(ValueError, match="act must be one of silu, None, got 'relu'"):
        run(x, weight, act="relu")  # type: ignore[arg-type]
    check_sentence(
        lambda: run(x, weight[:, :3]),
        r"diffkern\.linear_rows: weight must have shape \[outputs, inputs\] with the inputs of x, 4, got \[5, 3\]",
    )
    check_sentence(
        lambda: run(x[0, 0], weight), r"x must have shape \[\.\.\., inputs\], got a tensor without dimensions"
    )
    check_sentence(lambda: run(x, bias), r"weight must have shape \[outputs, inputs\], got \[5\]")
    check_sentence(lambda: run(x, weight, bias[:2]), r"bias must have shape \[outputs\] = \[5\], got \[2\]")
    check_sentence(lambda: run(x.long(), weight), r"x must be float64, float32, float16 or bfloat16, got int64")
    check_sentence(lambda: run(x, weight.half()), r"weight must have the dtype of x \(float32\), got float16")
    check_sentence(lambda: run(x, weight, bias.double()), r"bias must have the dtype of x \(float32\), got float64")
    check_sentence(lambda: run(x, weight.to("meta")), r"weight must be on the device of x \(cpu\), got meta")
