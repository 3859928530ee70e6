"""The CPU backward kernels of attention: accuracy, layouts, and the same bits however the work is split."""

from __future__ import annotations

import pytest
import torch
from helpers import tolerances
from helpers.attention_bounds import attention_floors
from helpers.cpu_kernels import Forward, Grads, Kernels, empty, exact_grads, place, plain_grads
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("tokens", "nchw", "rows", "qkv_nchw", "qkv_tokens", "odd_tokens", "odd_nchw")
NAMES = ("dq", "dk", "dv")
# Queries, keys: around the tiles of 96 and the vectors of 16, odd, cross attention, several chunks.
SIZES = (
    (1, 1),
    (64, 65),
    (95, 96),
    (97, 193),
    (15, 77),
    (130, 17),
    (77, 1),
    (1, 127),
    (300, 1000),
    (1000, 65),
    (700, 600),
)


def inputs(
    seed: int, batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, grad_out."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, size), (keys, size), (keys, 1.0), (queries, 1.0))
    return tuple(  # type: ignore[return-value]
        (torch.randn(batch, heads, n, dim, dtype=torch.float64, generator=generator) * s).to(dtype) for n, s in shapes
    )


def same(a: Grads, b: Grads) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def check(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> None:
    got = kernels.backward(q, k, v, scale, kernels.forward(q, k, v, scale), grad)
    exact, plain = exact_grads(q, k, v, scale, grad), plain_grads(q, k, v, scale, grad)
    floors = attention_floors(q, k, v, scale, grad)
    for name, ours, right, other in zip(NAMES, got, exact, plain, strict=True):
        what = f"{name} {q.dtype} {tuple(q.shape)} x {k.shape[2]}"
        tolerances.check(ours, right, other, what, floor=getattr(floors, name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_sizes(kernels: Kernels, dtype: torch.dtype, queries: int, keys: int) -> None:
    check(kernels, *inputs(queries, 2, 3, queries, keys, 40, dtype), 40**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*range(8, 257, 8), 512])
def test_dims(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    check(kernels, *inputs(dim, 2, 2, 65, 79, dim, dtype), dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.125, 0.0, 1e-3])
def test_scales(kernels: Kernels, dtype: torch.dtype, scale: float) -> None:
    check(kernels, *inputs(3, 2, 2, 100, 90, 64, dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "scale", "times"), [(4.0, 0.125, 2.0), (20.0, 1.0, 6.0)])
def test_large_logits(kernels: Kernels, dtype: torch.dtype, size: float, scale: float, times: float) -> None:
    """One key takes it all. dP - delta cancels but for the rounding of O, which the math backend does not need: the
    measure is torch's flash backend. Where logits reach 1e4, the few rows with two large weights decide, by luck, and
    the scalar level, without fused multiply-adds, rounds twice as often.
    """
    q, k, v, grad = inputs(3, 2, 2, 100, 90, 64, dtype, size)
    got = kernels.backward(q, k, v, scale, kernels.forward(q, k, v, scale), grad)
    exact, plain = exact_grads(q, k, v, scale, grad), plain_grads(q, k, v, scale, grad, flash=True)
    floors = attention_floors(q, k, v, scale, grad)
    for name, ours, right, other in zip(NAMES, got, exact, plain, strict=True):
        flash = (other.double() - right).abs().max().item()
        rounding = tolerances.TOLERANCES[dtype].allowed * right.abs().max().item()
        beyond = (ours.double() - right).abs() - getattr(floors, name).clamp(min=times * flash)
        assert beyond.max() <= rounding, f"{name}: {beyond.max():.3g} beyond flash, {flash:.3g}"


def test_float64(kernels: Kernels) -> None:
    for queries, keys, dim in ((1, 1, 8), (17, 5, 24), (65, 70, 40), (3, 2, 512)):
        check(kernels, *inputs(4, 2, 2, queries, keys, dim, torch.float64), dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "dim"), [(77, 65, 40), (1, 33, 8), (130, 1, 24), (600, 130, 264 - 8)])
def test_layouts(kernels: Kernels, dtype: torch.dtype, queries: int, keys: int, dim: int) -> None:
    """Every axis order of every operand gives the bits of contiguous tensors, and writes nothing else."""
    q, k, v, grad = inputs(5, 2, 2, queries, keys, dim, dtype)
    saved = kernels.forward(q, k, v, 0.2)
    expected = kernels.backward(q, k, v, 0.2, saved, grad)
    for i in range(len(ORDERS)):
        order = [ORDERS[(i + 3 * j) % len(ORDERS)] for j in range(4)]
        grads = (
            empty(order[0], q.shape, dtype),
            empty(order[1], k.shape, dtype),
            empty(order[2], v.shape, dtype),
        )
        around = [_memory(t) for t in grads]
        before = [m.clone() for m in around]
        operands = [place(t, o) for t, o in zip((q, k, v), order[:3], strict=True)]
        placed = Forward(place(saved.out, order[0]), saved.lse)
        got = kernels.backward(*operands, 0.2, placed, place(grad, order[3]), grads)
        assert same(got, expected), order
        for memory, old, t in zip(around, before, grads, strict=True):
            changed = int((memory.view(torch.uint8) != old.view(torch.uint8)).view(len(memory), -1).any(1).sum())
            assert changed == t.numel(), f"{changed} elements written, not {t.numel()}: {order}"
    placed_grad = place(grad, "strided")
    assert same(kernels.backward(q, k, v, 0.2, saved, placed_grad), expected)
    flat = torch.ones((), dtype=dtype).expand(q.shape)
    assert same(
        kernels.backward(q, k, v, 0.2, saved, flat), kernels.backward(q, k, v, 0.2, saved, torch.ones_like(grad))
    )


def _memory(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded(kernels: Kernels, dtype: torch.dtype) -> None:
    """Keys and values shared by batch and heads (stride 0) give the gradients of their copies."""
    q, k, v, grad = inputs(6, 2, 3, 70, 50, 32, dtype)
    one_k, one_v = (t[:1, :1].expand_as(t) for t in (k, v))
    one_q = q[:, :, :1].expand_as(q)
    saved = kernels.forward(q, one_k, one_v, 0.2)
    fresh = tuple(torch.empty_like(t) for t in (q, k, v))
    got = kernels.backward(q, one_k, one_v, 0.2, saved, grad, fresh)
    assert same(got, kernels.backward(q, one_k.contiguous(), one_v.contiguous(), 0.2, saved, grad))
    saved = kernels.forward(one_q, k, v, 0.2, torch.empty_like(q))
    got = kernels.backward(one_q, k, v, 0.2, saved, grad, tuple(torch.empty_like(t) for t in (q, k, v)))
    assert same(got, kernels.backward(one_q.contiguous(), k, v, 0.2, saved, grad))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(600, 1100, 24), (1100, 600, 24), (1100, 1030, 8), (300, 77, 256)]
)
def test_any_split(kernels: Kernels, dtype: torch.dtype, queries: int, keys: int, dim: int) -> None:
    """The bits do not depend on threads, on how tasks are grouped and ordered, nor on the rest of the batch."""
    if dtype == torch.float64:
        queries, keys = queries // 10, keys // 10
    q, k, v, grad = inputs(7, 2, 2, queries, keys, dim, dtype)
    saved = kernels.forward(q, k, v, 0.2)
    expected = kernels.backward(q, k, v, 0.2, saved, grad)
    for threads, at_once, backwards in ((1, 1, False), (1, 1, True), (2, 1, True), (3, 2, False), (5, 3, True)):
        got = kernels.backward(q, k, v, 0.2, saved, grad, threads=threads, at_once=at_once, backwards=backwards)
        assert same(got, expected), (threads, at_once, backwards)
    for b in range(2):
        part = [t[b : b + 1] for t in (q, k, v, grad)]
        alone = kernels.backward(*part[:3], 0.2, Forward(saved.out[b : b + 1], saved.lse[b : b + 1]), part[3])
        assert same(alone, tuple(t[b : b + 1] for t in expected))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(kernels: Kernels, dtype: torch.dtype, bad: str, value: float) -> None:
    """One NaN or infinity makes those gradients NaN that the formula makes NaN."""
    queries, keys = 69, 67
    q, k, v, grad = inputs(8, 1, 1, queries, keys, 24, dtype)
    {"q": q, "k": k, "v": v, "grad": grad}[bad][0, 0, 66, 5] = value
    got = kernels.backward(q, k, v, 0.2, kernels.forward(q, k, v, 0.2), grad)
    for name, ours, right in zip(NAMES, got, exact_grads(q, k, v, 0.2, grad), strict=True):
        assert torch.equal(ours.isfinite(), right.isfinite()), f"{name}: {bad} = {value}"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_empty(kernels: Kernels, dtype: torch.dtype) -> None:
    """Without queries dk and dv are 0; without heads or samples nothing happens."""
    q, k, v, grad = inputs(9, 1, 2, 0, 70, 16, dtype)
    _, dk, dv = kernels.backward(q, k, v, 0.2, kernels.forward(q, k, v, 0.2), grad)
    assert torch.equal(dk, torch.zeros_like(dk))
    assert torch.equal(dv, torch.zeros_like(dv))
    for batch, heads in ((0, 2), (2, 0)):
        q, k, v, grad = inputs(9, batch, heads, 3, 70, 16, dtype)
        kernels.backward(q, k, v, 0.2, kernels.forward(q, k, v, 0.2), grad)
