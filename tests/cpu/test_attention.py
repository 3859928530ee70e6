"""The CPU forward kernels of attention, at every level of this machine: accuracy, layouts, and bits that do not depend
on how the work is split.
"""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tolerances
from helpers.attention_bounds import attention_floors
from helpers.cpu_kernels import Forward, Kernels, empty, formula, place
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ORDERS = ("tokens", "nchw", "rows", "qkv_nchw", "qkv_tokens", "odd_tokens", "odd_nchw")
# Around the vectors of 16, the query tiles of 64 and the key tiles of 96, odd, cross attention.
SIZES = ((1, 1), (1, 77), (15, 16), (16, 15), (17, 95), (63, 96), (64, 97), (65, 64), (77, 65), (127, 130), (130, 1))
# Few queries or keys are read by rows: around blocks of 2 and 4, 8 or 12 queries, 8 keys and passes of 96 and 192.
FEW = ((2, 2), (3, 5), (4, 96), (5, 97), (7, 192), (8, 193), (9, 400), (12, 191), (13, 40), (30, 8), (65, 7), (129, 3))
# The error of the log-sum-exp that a level may show: bfloat16 logits are sums of exact products, its weights rounded.
LSE = {torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2.0**-8, torch.float64: 1e-14}


def inputs(seed: int, batch: int, heads: int, sizes: tuple[int, int], dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v."""
    generator = torch.Generator().manual_seed(seed)
    counts = (sizes[0], sizes[1], sizes[1])
    return [torch.randn(batch, heads, n, dim, dtype=torch.float64, generator=generator).to(dtype) for n in counts]


def same(a: Forward, b: Forward) -> bool:
    return all(
        torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in zip(a, b, strict=True)
    )


def check(kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    got = kernels.forward(q, k, v, scale)
    wide = [t.double() for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    what = f"{kernels.isa} {q.dtype} {tuple(q.shape)} x {k.shape[2]}"
    floor = attention_floors(q, k, v, scale).out
    tolerances.check(got.out, formula(*wide, scale), plain, what, floor=floor)
    lse = torch.logsumexp(wide[0] @ wide[1].mT * scale, -1)
    error = ((got.lse.double() - lse).abs() / (1 + lse.abs())).max().item()
    assert error <= LSE[q.dtype], f"{what}: log-sum-exp off by {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_sizes(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    check(kernels, *inputs(sizes[0], 2, 3, sizes, 40, dtype), 40**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", FEW)
def test_few_queries_or_keys(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    check(kernels, *inputs(sizes[0], 2, 2, sizes, 72, dtype), 72**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*range(8, 257, 8), 512])
@pytest.mark.parametrize("sizes", [(3, 99), (35, 5)])
def test_dims_of_few(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int], dim: int) -> None:
    check(kernels, *inputs(dim, 2, 2, sizes, dim, dtype), dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [*range(8, 257, 8), 512])
def test_dims(kernels: Kernels, dtype: torch.dtype, dim: int) -> None:
    check(kernels, *inputs(dim, 2, 2, (65, 99), dim, dtype), dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "dim"), [((1000, 1000), 24), ((40, 4096), 64), ((4096, 77), 32)])
def test_many(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int], dim: int) -> None:
    check(kernels, *inputs(1, 1, 1, sizes, dim, dtype), dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 3.0])
@pytest.mark.parametrize("sizes", [(100, 90), (5, 210), (30, 8)])
def test_scales(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int], scale: float) -> None:
    check(kernels, *inputs(3, 2, 2, sizes, 64, dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [10.0, 100.0, 1000.0])
def test_large_logits(kernels: Kernels, dtype: torch.dtype, size: float) -> None:
    q, k, v = inputs(4, 1, 16, (130, 127), 64, dtype)  # many: few queries have two keys of nearly the same logit
    check(kernels, q * size, k, v, 0.125)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_one_key(kernels: Kernels, dtype: torch.dtype) -> None:
    """The weight of the only key is exactly 1."""
    q, k, v = inputs(5, 1, 2, (70, 1), 40, dtype)
    got = kernels.forward(q, k, v, 0.7)
    assert torch.equal(got.out, v.expand_as(q))


def test_float64(kernels: Kernels) -> None:
    for sizes, dim in (((1, 1), 8), ((17, 5), 24), ((65, 70), 40), ((3, 2), 512)):
        check(kernels, *inputs(4, 2, 2, sizes, dim, torch.float64), dim**-0.5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("sizes", "dim"), [((77, 65), 40), ((1, 33), 8), ((130, 1), 24), ((300, 131), 256), ((8, 200), 72), ((150, 5), 40)]
)
def test_layouts(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int], dim: int) -> None:
    """Every axis order of every operand gives the bits of contiguous tensors, and writes nothing else."""
    q, k, v = inputs(6, 2, 2, sizes, dim, dtype)
    expected = kernels.forward(q, k, v, 0.2)
    for i in range(len(ORDERS)):
        order = [ORDERS[(i + 3 * j) % len(ORDERS)] for j in range(4)]
        out = empty(order[3], q.shape, dtype)
        memory = torch.empty(0, dtype=dtype).set_(out.untyped_storage())
        operands = [place(t, o) for t, o in zip((q, k, v), order[:3], strict=True)]
        assert same(kernels.forward(*operands, 0.2, out), expected), order
        written = int((~memory.isnan()).sum())
        assert written == out.numel(), f"{written} elements written, not {out.numel()}: {order}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded(kernels: Kernels, dtype: torch.dtype) -> None:
    """Operands shared by batch, heads or tokens (stride 0) give the bits of their copies."""
    q, k, v = inputs(7, 2, 3, (70, 50), 32, dtype)
    one_k, one_v, one_q = k[:1, :1].expand_as(k), v[:, :1].expand_as(v), q[:, :, :1].expand_as(q)
    out = torch.empty_like(q)
    got = kernels.forward(one_q, one_k, one_v, 0.2, out)
    assert same(got, kernels.forward(one_q.contiguous(), one_k.contiguous(), one_v.contiguous(), 0.2))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("sizes", "dim"), [((600, 110), 24), ((333, 260), 40), ((300, 77), 256), ((200, 6), 40)])
def test_any_split(kernels: Kernels, dtype: torch.dtype, sizes: tuple[int, int], dim: int) -> None:
    """The bits depend neither on threads, nor on the tasks of a call, nor on the rest of the batch."""
    q, k, v = inputs(8, 2, 2, sizes, dim, dtype)
    expected = kernels.forward(q, k, v, 0.2)
    for threads in (2, 3, 7, 2 * 2 * math.ceil(sizes[0] / 64)):  # the last: every task in a call of its own
        assert same(kernels.forward(q, k, v, 0.2, threads=threads), expected), threads
    for b in range(2):
        alone = kernels.forward(q[b : b + 1], k[b : b + 1], v[b : b + 1], 0.2)
        assert same(alone, Forward(expected.out[b : b + 1], expected.lse[b : b + 1]))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bad", ["q", "k", "v"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan(kernels: Kernels, dtype: torch.dtype, bad: str, value: float) -> None:
    """One NaN or infinity makes those outputs NaN or infinite that the formula does, and touches no other."""
    q, k, v = inputs(9, 1, 2, (101, 131), 24, dtype)
    clean = kernels.forward(q, k, v, 0.2)
    {"q": q, "k": k, "v": v}[bad][0, 1, -1, 5] = value  # the odd last token
    got = kernels.forward(q, k, v, 0.2)
    right = formula(q.double(), k.double(), v.double(), 0.2)
    assert torch.equal(got.out.isnan(), right.isnan())
    assert torch.equal(got.out.isinf(), right.isinf())
    assert torch.equal(got.out[:, :1], clean.out[:, :1])
    if bad == "q":
        assert torch.equal(got.out[:, :, :100], clean.out[:, :, :100])
    if bad != "v" and math.isnan(value):
        assert torch.equal(got.lse.isnan(), right.isnan().any(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["tokens", "nchw"])
def test_nothing_is_left(kernels: Kernels, dtype: torch.dtype, order: str) -> None:
    """A call that leaves NaN all over a thread's scratch memory does not show in the next one, of an odd size."""
    q, k, v = (place(t, order) for t in inputs(10, 1, 1, (70, 77), 40, dtype))
    expected = kernels.forward(q, k, v, 0.2)
    kernels.forward(*(empty(order, (1, 1, n, 40), dtype) for n in (80, 78, 78)), 0.2)
    assert same(kernels.forward(q, k, v, 0.2), expected)
    assert expected.out.isfinite().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_empty(kernels: Kernels, dtype: torch.dtype) -> None:
    for batch, heads, queries in ((1, 2, 0), (0, 2, 3), (2, 0, 3)):
        q, k, v = inputs(9, batch, heads, (queries, 70), 16, dtype)
        assert kernels.forward(q, k, v, 0.2).out.shape == q.shape
