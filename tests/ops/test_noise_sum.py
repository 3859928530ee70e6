"""Weighted sums of noise by address: the formula to the bit, every layout and dtype, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from helpers.memory import SLACK, allocated
from helpers.op_cases import LAYOUTS, SHAPES, arrange, native_draws, same_bits, threads
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

from diffkern import ops, reference, streams

F64 = torch.float64


def terms(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n streams, the first and the last there are among them, and weights of both signs and many sizes."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(0, streams.LIMIT, (n,), generator=generator)
    chosen[:2] = torch.tensor([0, streams.LIMIT - 1])[:n]
    weights = (
        torch.randn(n, generator=generator, dtype=F64)
        * torch.tensor([1.0, 1e-3, 0.3, 30.0], dtype=F64).repeat(n // 4 + 1)[:n]
    )
    return chosen, weights


def plain(shape: tuple[int, ...], seeds: Tensor, chosen: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum as it is written in PyTorch, in `dtype`."""
    total = torch.zeros(shape, dtype=dtype)
    for stream, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
        total = total + weight * ops.randn(shape, seeds, stream, dtype=dtype)
    return total


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_is_the_reference(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        seeds = ops.seeds(5, shape[0])
        for n in (0, 1, 2, 7, 24, 64):
            chosen, weights = terms(n, n)
            with native_draws():
                exact = reference.noise_sum(shape, seeds, chosen, weights)
            ours = ops.noise_sum(shape, seeds, chosen, weights, dtype)
            assert ours.dtype == dtype
            check(ours, exact, plain(shape, seeds, chosen, weights, dtype), f"{shape}, {n} terms")


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 a b + c with one rounding: the product of float32 is exact in float64, and the sum is rounded to odd."""
    product, c = a.double() * b.double(), c.double()
    total = product + c
    first = total - product
    error = (product - (total - first)) + (c - first)  # total + error is the exact sum (Knuth)
    inexact = (error != 0) & (total.view(torch.int64) & 1 == 0)
    towards = torch.where(error > 0, math.inf, -math.inf).to(F64)
    return torch.where(inexact, torch.nextafter(total, towards), total).float()


def test_one_fma_a_term_in_order() -> None:
    shape, seeds = (2, 3, 37, 5), ops.seeds(2, 2)
    chosen, weights = terms(9, 1)
    expected = torch.zeros(shape)
    for stream, weight in zip(chosen.tolist(), weights, strict=True):
        expected = fma(weight.float().expand(shape), ops.randn(shape, seeds, stream), expected)
    assert same_bits(ops.noise_sum(shape, seeds, chosen, weights), expected)
    for dtype in (torch.float16, torch.bfloat16):  # one rounding, of the float32 sum
        assert same_bits(ops.noise_sum(shape, seeds, chosen, weights, dtype), expected.to(dtype))
    backwards = ops.noise_sum(shape, seeds, chosen.flip(0), weights.flip(0))
    assert not same_bits(backwards, expected)
    torch.testing.assert_close(backwards, expected, rtol=1e-4, atol=1e-4)


def test_one_term_is_randn() -> None:
    shape, seeds = (3, 5, 7), ops.seeds(1, 3)
    one = torch.ones(1, dtype=F64)
    for dtype in STATE_DTYPES:
        for stream in (0, 5, streams.BROWNIAN + 9):
            expected = ops.randn(shape, seeds, stream, dtype=dtype)
            assert same_bits(ops.noise_sum(shape, seeds, torch.tensor([stream]), one, dtype), expected)
    twice = ops.noise_sum(shape, seeds, torch.tensor([5, 5]), torch.tensor([1.0, -1.0], dtype=F64))
    assert same_bits(twice, torch.zeros(shape))


def test_no_terms_are_zeros() -> None:
    out = torch.full((2, 3), math.nan)
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=F64)
    assert same_bits(ops.noise_sum_out(ops.seeds(0, 2), *nothing, out), torch.zeros(2, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    seeds, (chosen, weights) = ops.seeds(3, shape[0]), terms(5)
    expected = ops.noise_sum(shape, seeds, chosen, weights, dtype)
    for layout in LAYOUTS:
        if layout != "expanded":
            out = arrange(torch.full(shape, math.nan, dtype=dtype), layout)
            assert ops.noise_sum_out(seeds, chosen, weights, out) is out
            assert same_bits(out, expected), layout


def test_lists_of_any_stride() -> None:
    seeds, (chosen, weights) = ops.seeds(3, 2), terms(6)
    expected = ops.noise_sum((2, 9), seeds, chosen[::2].clone(), weights[1::2].clone())
    assert same_bits(ops.noise_sum((2, 9), seeds, chosen[::2], weights[1::2]), expected)
    same = ops.noise_sum((2, 9), seeds, chosen[:1].expand(3), weights[:1].expand(3))
    assert same_bits(same, ops.noise_sum((2, 9), seeds, chosen[:1].repeat(3), weights[:1].repeat(3)))


def test_bits_do_not_depend_on_threads_batch_or_position() -> None:
    shape, seeds = (6, 3, 41, 43), ops.seeds(9, 6)
    chosen, weights = terms(20)
    with threads(1):
        expected = ops.noise_sum(shape, seeds, chosen, weights)
    for n in (2, 3, 5):
        with threads(n):
            assert same_bits(ops.noise_sum(shape, seeds, chosen, weights), expected)
    for b in range(6):
        assert same_bits(ops.noise_sum((1, *shape[1:]), seeds[b : b + 1], chosen, weights), expected[b : b + 1])
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert same_bits(ops.noise_sum(shape, seeds[order], chosen, weights), expected[order])
    assert same_bits(ops.noise_sum((6, 1001), seeds, chosen, weights), expected.flatten(1)[:, :1001])
    assert same_bits(ops.noise_sum(shape, seeds[:1].expand(6), chosen, weights), expected[:1].expand(shape))


def test_memory_is_the_output() -> None:
    shape, seeds, (chosen, weights) = (4, 3, 64, 65), ops.seeds(0, 4), terms(24)
    size = 4 * math.prod(shape)
    used, _ = allocated(lambda: ops.noise_sum(shape, seeds, chosen, weights))
    assert size <= used <= size + SLACK
    for layout in LAYOUTS[:-1]:
        out = arrange(torch.zeros(shape), layout)
        assert allocated(lambda out=out: ops.noise_sum_out(seeds, chosen, weights, out))[0] <= SLACK


@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_nothing_is_written_outside(dtype: torch.dtype) -> None:
    chosen, weights = terms(3)
    for shape in ((1, 1), (3, 1023), (2, 1025), (2, 3, 5, 7)):
        buffer = torch.full((math.prod(shape) + 10,), -7.0, dtype=dtype)
        out = buffer[5:-5].view(shape)
        ops.noise_sum_out(ops.seeds(0, shape[0]), chosen, weights, out)
        assert bool((buffer[:5] == -7).all())
        assert bool((buffer[-5:] == -7).all())
        assert same_bits(out, ops.noise_sum(shape, ops.seeds(0, shape[0]), chosen, weights, dtype))


def test_compiles_as_one_graph() -> None:
    seeds, (chosen, weights) = ops.seeds(3, 2), terms(6)

    def run(x: Tensor, seeds: Tensor, weights: Tensor) -> Tensor:
        z = ops.noise_sum(x.shape, seeds, chosen, weights) + x
        ops.noise_sum_out(seeds, chosen, 2 * weights, z)
        return z + ops.noise_sum(x.shape, seeds, chosen, weights, torch.float64)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x in (torch.ones(2, 9), torch.ones(2, 9)):
        assert same_bits(compiled(x, seeds, weights), run(x, seeds, weights))
        weights = weights * 1.5  # values, not constants of the graph


S = ops.seeds(0, 2)
J, W = torch.tensor([3, 4]), torch.tensor([0.5, 2.0], dtype=F64)
OUT = torch.zeros(2, 3)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no seeds": (lambda: ops.noise_sum((3, 3), S, J, W), "seeds must have shape [3] (one seed a sample), got [2]"),
    "seeds dtype": (lambda: ops.noise_sum((2, 3), S.int(), J, W), "seeds must be int64, got int32"),
    "size empty": (lambda: ops.noise_sum((), S, J, W), "size must have a batch dimension, got []"),
    "size negative": (lambda: ops.noise_sum((2, -3), S, J, W), "size must not be negative, got [2, -3]"),
    "dtype": (lambda: ops.noise_sum((2, 3), S, J, W, torch.int32), "out must be float64, float32, float16 or bfloat16"),
    "streams dtype": (lambda: ops.noise_sum((2, 3), S, J.int(), W), "streams must be int64, got int32"),
    "streams 2-D": (lambda: ops.noise_sum((2, 3), S, J[None], W), "streams must have shape [n], got [1, 2]"),
    "streams negative": (lambda: ops.noise_sum((2, 3), S, -J, W), "streams must be in [0, 2^53), got -3 at 0"),
    "streams large": (
        lambda: ops.noise_sum((2, 3), S, torch.tensor([1, 2**53]), W),
        "streams must be in [0, 2^53), got 9007199254740992 at 1",
    ),
    "many": (
        lambda: ops.noise_sum((2, 3), S, *terms(65)),
        "streams must hold at most 64 terms, got 65",
    ),
    "weights dtype": (lambda: ops.noise_sum((2, 3), S, J, W.float()), "weights must be float64, got float32"),
    "weights count": (
        lambda: ops.noise_sum((2, 3), S, J, W[:1]),
        "weights must have shape [2] (one a stream), got [1]",
    ),
    "weights nan": (lambda: ops.noise_sum((2, 3), S, J, W * math.nan), "weights must be finite, got nan at 0"),
    "weights inf": (lambda: ops.noise_sum((2, 3), S, J, W / 0), "weights must be finite, got inf at 0"),
    "out stride 0": (
        lambda: ops.noise_sum_out(S, J, W, torch.zeros(2, 1).expand(2, 3)),
        "out must not have stride 0 (an expanded tensor cannot be written)",
    ),
    "out holds the weights": (
        lambda: (lambda w: ops.noise_sum_out(S, J, w, w[:, None]))(W.clone()),
        "out must not overlap weights in memory",
    ),
    "out on meta": (lambda: ops.noise_sum_out(S, J, W, OUT.to("meta")), "seeds must be on the device of out (meta)"),
    "out requires grad": (
        lambda: ops.noise_sum_out(S, J, W, OUT.clone().requires_grad_()),
        "not differentiable, and a tensor requires grad",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(RuntimeError, match=re.escape("diffkern.noise_sum: ") + ".*" + re.escape(sentence)):
        call()
