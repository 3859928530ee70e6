"""Float32 attention in the emulator: forward and backward against float64, in every axis order, and what it costs."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from helpers import tolerances
from ptx.attention_harness import (
    HEAD_ORDERS,
    Attention,
    Run,
    check,
    conflicts,
    exact,
    place,
    plain,
    random,
    same_order,
    share,
    split_heads,
)
from ptx.harness import same_bits
from torch import Tensor

pytestmark = pytest.mark.full  # test_every_op.py has each op once

GRADIENTS = ("dq", "dk", "dv")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, grad_out


@functools.cache
def device(arch: str = "sm_80") -> Attention:
    return Attention(arch)


def inputs(dim: int, queries: int, keys: int, layouts: str, heads: tuple[int, int] = (1, 1)) -> Inputs:
    """layouts: one for all, or those of q, k, v and grad_out with a bar between them."""
    each = (layouts.split("|") * 4)[:4]
    sizes = (queries, keys, keys, queries)
    made = [place(random(i, *heads, n, dim), layout) for i, (n, layout) in enumerate(zip(sizes, each, strict=True))]
    return made[0], made[1], made[2], made[3]


def forward(case: Inputs, arch: str = "sm_80", scale: float | None = None) -> Run:
    run = device(arch).forward(*case[:3], scale)
    check(run, ("out", "lse"), *case, scale)
    return run


def backward(
    case: Inputs,
    first: Run,
    arch: str = "sm_80",
    scale: float | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Run:
    """After its forward pass: both round a logit in the same way, and so lse corrects what it is wrong by."""
    q, k, v, grad = case
    run = device(arch).backward(q, k, v, first.out, grad, first.lse, scale, into)
    check(run, GRADIENTS, *case, scale)
    return run


def tile_launches(run: Run) -> list:
    return [launch for launch in run.launches if "ffma" in launch["kernel"]]


# Head dim, queries, keys, layout. All of them are read 16 bytes at a time.
ALIGNED = [
    (8, 65, 130, "bnhd"),
    (24, 64, 76, "nchw"),
    (40, 64, 64, "nchw"),
    (40, 63, 77, "bhnd"),
    (64, 130, 65, "bnhd"),
    (80, 32, 40, "nchw"),
    (128, 64, 64, "bnhd"),
    (160, 64, 24, "nchw"),
    (256, 17, 33, "bhnd/8"),
    (256, 64, 32, "nchw"),
    (512, 8, 9, "bnhd"),
    (512, 4, 8, "nchw"),
]
# The general path: mixed orders, odd addresses and lengths.
GENERAL = [
    (8, 63, 65, "nchw|bnhd"),
    (40, 64, 77, "nchw|bnhd|bnhd|bnhd"),
    (24, 1, 1, "nchw"),
    (40, 49, 49, "nchw"),
    (80, 20, 33, "bnhd+1"),
    (64, 64, 64, "bnhd|nchw|nchw+1|bhnd/3"),
    (160, 7, 5, "bhnd|bhnd|nchw|nchw"),
]


def check_cost(run: Run, aligned: bool, least: float) -> None:
    """No bank conflicts, all copies of 16 bytes, each byte of DRAM once, and how much of the work is the products."""
    for launch in tile_launches(run):
        assert (conflicts(launch) == [] and launch["global_cp_async"]["share_16"] == 1) == aligned
        assert share(launch, "f32.fma") > least, launch


@pytest.mark.parametrize(("dim", "queries", "keys", "layouts"), ALIGNED)
def test_aligned(dim: int, queries: int, keys: int, layouts: str) -> None:
    case = inputs(dim, queries, keys, layouts)
    run = forward(case)
    check_cost(run, True, 0.5)
    (launch,) = tile_launches(run)
    reads, writes = run.minimum_bytes()
    # 32-byte sectors: one more at each end of each operand
    assert launch["unique_sectors"]["read_bytes"] <= reads + 3 * 64
    assert launch["unique_sectors"]["write_bytes"] <= writes + 2 * 64
    check_cost(backward(case, run), True, 0.5)


@pytest.mark.parametrize(("dim", "queries", "keys", "layouts"), GENERAL)
def test_any_strides(dim: int, queries: int, keys: int, layouts: str) -> None:
    case = inputs(dim, queries, keys, layouts)
    run = forward(case)
    check_cost(run, False, 0.3)
    check_cost(backward(case, run), False, 0.3)


# ------------------------------------------------------------------------------------------------- the work itself
@pytest.mark.parametrize(("dim", "least"), [(64, 0.67), (128, 0.61)])
@pytest.mark.parametrize("layout", ["bnhd", "nchw"])
def test_share_of_the_products(dim: int, least: float, layout: str) -> None:
    """Of whole tiles, counted in PTX, where each address is an instruction; ptxas folds most of them away."""
    q, k, v, _ = inputs(dim, 128, 128, layout)
    (launch,) = device().forward(q, k, v).launches
    assert share(launch, "f32.fma") > least
    assert launch["instructions_by_class"]["ld.shared"] < 0.11 * launch["instructions_by_class"]["f32.fma"]
    assert launch["shared"]["bank_conflicts"] == 0
    products = 2 * 128 * 128 * dim // 32  # warp instructions of both, nothing padded
    assert products <= launch["instructions_by_class"]["f32.fma"] < 1.02 * products


# ------------------------------------------------------------------------------------------------------ layouts
@pytest.mark.parametrize("order", HEAD_ORDERS)
def test_heads_of_one_tensor(order: str) -> None:
    """q, k, v in one tensor [B, 3C, N], and their gradients into another."""
    qkv, grads = (random(i, 2, 3 * 2 * 8, 20) for i in (0, 1))
    q, k, v = split_heads(qkv, 2, order)
    grad = place(random(2, 2, 2, 20, 8), "nchw")
    case = (q, k, v, grad)
    backward(case, forward(case), into=split_heads(grads, 2, order))
    assert not grads.isnan().any()


def test_expanded_heads() -> None:
    case = inputs(16, 20, 12, "bnhd|expanded bnhd|expanded nchw|bnhd", (1, 3))
    into = (same_order(case[0]), torch.empty(case[1].shape), torch.empty(case[2].shape))
    backward(case, forward(case), into=into)


# ------------------------------------------------------------------------------------------------------ promises
@pytest.mark.parametrize("layout", ["bnhd", "nchw"])
def test_a_sample_does_not_know_its_batch(layout: str) -> None:
    q, k, v, grad = inputs(24, 20, 72, layout, (3, 2))
    many = device().forward(q, k, v)
    many_back = device().backward(q, k, v, many.out, grad, many.lse)
    one = device().forward(q[1:2], k[1:2], v[1:2])
    # at an odd address everything takes the general path
    odd = [place(t[1:2], f"{layout}+1") for t in (q, k, v, many.out, grad)]
    one_back = device().backward(*odd, many.lse[1:2].clone())
    for name in ("out", "lse"):
        assert same_bits(many.tensors[name][1:2], one.tensors[name])
    for name in GRADIENTS:
        assert same_bits(many_back.tensors[name][1:2], one_back.tensors[name])


def test_split_over_keys() -> None:
    batch = inputs(8, 5, 1030, "bnhd", (2, 1))
    two = forward(batch)
    assert len(two.launches) == 2  # and the kernel that combines
    one = device().forward(*(t[1:] for t in batch[:3]))
    assert same_bits(two.out[1:], one.out)
    assert same_bits(two.lse[1:], one.lse)


def test_long_sums() -> None:
    """The error does not grow with the number of keys as one long chain of sums would let it."""
    case = inputs(8, 64, 1024, "bnhd")
    # so many heads that the keys are not split, of which one is run
    q, k, v = (t.expand(-1, 128, -1, -1) for t in case[:3])
    run = device().forward(q, k, v, complete=False, only_ctas=[0])
    assert len(run.launches) == 1
    tolerances.check(run.out[:, :1], exact(*case).out, plain(*case).out)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 3.0])
def test_scales(scale: float) -> None:
    case = inputs(8, 5, 70, "bnhd")
    backward(case, forward(case, scale=scale), scale=scale)


def test_large_logits() -> None:
    q, k, v, grad = inputs(16, 9, 70, "bnhd")
    q, k = q * 60, k * 60
    run = forward((q, k, v, grad))
    assert run.lse.abs().max() > 1000
    # float32 holds a log-sum-exp of thousands to 1e-4, and so much may the probabilities of the backward pass be off
    back = device().backward(q, k, v, run.out, grad, run.lse)
    true = exact(q, k, v, grad)
    assert torch.allclose(back.dv.double(), true.dv, rtol=1e-3, atol=1e-3)
    assert all(bool(back.tensors[name].isfinite().all()) for name in GRADIENTS)


def test_one_key() -> None:
    case = inputs(8, 3, 1, "bnhd")
    run = backward(case, forward(case))
    assert not run.dq.any()
    assert not run.dk.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_not_finite(bad: float, where: str) -> None:
    """NaN wherever the formula has it, and nowhere else."""
    q, k, v, _ = inputs(8, 9, 70, "bnhd")
    {"q": q, "k": k, "v": v}[where][0, 0, 3, 5] = bad
    run = device().forward(q, k, v)
    true = exact(q, k, v)
    assert torch.equal(run.out.isnan(), true.out.isnan())
    assert torch.equal(run.out.isinf(), true.out.isinf())
    assert not run.out.isfinite().all()


def test_empty() -> None:
    q, k, v, _ = inputs(8, 0, 5, "bnhd")
    assert device().forward(q, k, v).launches == []


# --------------------------------------------------------------------------------------------------- architectures
CASES_75: Sequence[tuple[int, int, int, str]] = [
    (24, 65, 66, "bnhd"),
    (40, 20, 22, "nchw"),
    (128, 10, 12, "bnhd"),
    (256, 4, 8, "nchw"),
]


@pytest.mark.parametrize(("dim", "queries", "keys", "layouts"), CASES_75)
def test_without_asynchronous_copies(dim: int, queries: int, keys: int, layouts: str) -> None:
    case = inputs(dim, queries, keys, layouts)
    backward(case, forward(case, "sm_75"), "sm_75")


def test_largest_head_in_64_kilobytes() -> None:
    forward(inputs(512, 3, 5, "bnhd"), "sm_75")
