"""Forward attention in float16 and bfloat16: the tensor-core kernels, the split over keys, and the way to them."""

from __future__ import annotations

import functools
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attention_bounds import attention_floors
from ptx.attention_harness import (
    Attention,
    Run,
    conflicts,
    exact,
    place,
    plain,
    random,
    share,
    split_heads,
)
from ptx.harness import CUDA_CSRC, bits, flags
from torch import Tensor

pytestmark = pytest.mark.full  # test_every_op.py has each op once

F16, BF16 = torch.float16, torch.bfloat16
# What rounding the output costs: half a unit in the last place of 1.
STORE = {F16: 2.0**-12, BF16: 2.0**-9}


@functools.cache
def attention(arch: str = "sm_80") -> Attention:
    return Attention(arch)


def inputs(
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype,
    layout: str | tuple[str, str, str] = "bnhd",
    batch: int = 1,
    heads: int = 1,
    std: float = 1.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    layouts = (layout,) * 3 if isinstance(layout, str) else layout
    q, k, v = (
        place(random(3 * seed + i, batch, heads, n, dim, dtype=dtype, std=1.0 if i == 2 else std), where)
        for i, (n, where) in enumerate(zip((queries, keys, keys), layouts, strict=True))
    )
    return q, k, v


def check(run: Run, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    """The accuracy rule: at most twice the error of PyTorch's own formula, and what rounding the output costs."""
    reference, theirs = exact(q, k, v, scale=scale), plain(q, k, v, scale=scale)
    error = (run.out.double() - reference.out).abs()
    floor = attention_floors(q, k, v, q.shape[3] ** -0.5 if scale is None else scale).out
    allowed = floor.clamp(min=2 * (theirs.out.double() - reference.out).abs().max().item())
    beyond = (error - allowed).max().item()
    assert beyond <= STORE[q.dtype] * reference.out.abs().max().item(), (error.max().item(), beyond)
    largest = max(1.0, reference.lse.abs().max().item())
    assert (run.lse.double() - reference.lse).abs().max().item() <= 4e-6 * largest


def run_and_check(q: Tensor, k: Tensor, v: Tensor, arch: str = "sm_80", **options: Any) -> Run:
    run = attention(arch).forward(q, k, v, **options)
    check(run, q, k, v, options.get("scale"))
    return run


# -------------------------------------------------------------------------------------------------------- results
# Every class of head dims with its tails; queries and keys beside the edges of tiles.
DIMS = (
    (8, 130, 77),
    (24, 64, 130),
    (40, 65, 136),
    (64, 130, 72),
    (72, 63, 65),
    (80, 16, 104),
    (96, 65, 64),
    (104, 1, 40),
    (128, 130, 72),
    (136, 33, 65),
    (160, 65, 72),
    (256, 31, 130),
    (512, 65, 72),
)


@pytest.mark.parametrize("layout", ["bnhd", "nchw"])
@pytest.mark.parametrize(("dim", "queries", "keys"), DIMS)
def test_head_dims(dim: int, queries: int, keys: int, layout: str) -> None:
    dtype = BF16 if (layout == "nchw") == (queries % 2 == 0) else F16
    run_and_check(*inputs(queries, keys, dim, dtype, layout))


@pytest.mark.parametrize("tokens", [1, 2, 7, 49, 63, 64, 65, 77, 127, 130])
def test_tokens(tokens: int) -> None:
    run_and_check(*inputs(tokens, tokens, 24, F16, "nchw" if tokens % 2 else "bhnd"))


@pytest.mark.parametrize(
    "layouts",
    [
        ("nchw", "bnhd", "bnhd"),  # an image looks at text
        ("bnhd", "nchw", "nchw"),
        ("bnhd", "nchw", "bnhd"),
        ("nchw", "bnhd", "nchw"),
        ("bhnd+1", "bhnd+3", "bhnd+8"),
        ("bnhd/4", "bnhd/8", "bnhd/3"),
        ("nchw+1", "nchw/2", "nchw+4"),
        ("nchw/4", "nchw/12", "nchw/20"),  # aligned rows, the last chunk of each is not whole
    ],
    ids=",".join,
)
def test_layouts(layouts: tuple[str, str, str]) -> None:
    for dim in (40, 160):
        run_and_check(*inputs(36, 76, dim, F16, layouts))


def test_heads_that_are_one_in_memory() -> None:
    run_and_check(*inputs(4, 12, 40, F16, ("bnhd", "expanded bnhd", "expanded nchw"), batch=2, heads=2))


@pytest.mark.parametrize("order", ["legacy", "new", "edm"])
def test_one_tensor_of_q_k_v(order: str) -> None:
    """The channels of a convolution, split in place; q's order is that of the output."""
    qkv = random(1, 2, 3 * 2 * 40, 64, dtype=F16)
    run = run_and_check(*split_heads(qkv, 2, order))
    assert run.out.stride(2) == 1


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-3, 2.0])
def test_scales(scale: float) -> None:
    q, k, v = inputs(40, 70, 32, F16)
    run_and_check(q, k, v, scale=scale)


@pytest.mark.parametrize("dim", [64, 160])
def test_large_logits(dim: int) -> None:
    """Far beyond what exp can take; one key wins each row, a later one than the largest of the first tile."""
    q, k, v = inputs(40, 150, dim, BF16, std=30.0)
    reference = exact(q, k, v)
    run = attention().forward(q, k, v)
    assert reference.lse.max() > 1000
    assert (run.lse.double() - reference.lse).abs().max() <= 1e-5 * reference.lse.abs().max()
    assert (run.out.double() - reference.out).abs().max() <= 2.0**-8 * v.abs().max()


@pytest.mark.parametrize("dim", [24, 136])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_go_where_the_formula_sends_them(where: str, dim: int) -> None:
    for value in (math.nan, math.inf):
        tensors = dict(zip("qkv", inputs(70, 140, dim, F16, "nchw"), strict=True))
        tensors[where][0, 0, 66, 5] = value
        q, k, v = tensors.values()
        reference = exact(q, k, v)
        run = attention().forward(q, k, v)
        wrong = reference.out.isnan()
        assert torch.equal(run.out.isnan(), wrong), (where, value)
        assert torch.equal(run.lse.isfinite(), reference.lse.isfinite()), (where, value)
        finite = reference.out.isfinite()
        assert not finite.any() or (run.out.double() - reference.out)[finite].abs().max() <= 2e-3


def test_all_of_the_first_tile_at_minus_infinity() -> None:
    """Keys whose logits are -inf take no part, even when they come first; a row of nothing else is NaN."""
    q, k, v = inputs(4, 130, 8, F16)
    q[...] = 1.0
    k[0, 0, :70, 0] = -math.inf
    check(attention().forward(q, k, v), q, k, v)
    k[...] = -math.inf
    run = attention().forward(q, k, v)
    assert run.out.isnan().all()
    assert (run.lse == -math.inf).all()


@pytest.mark.parametrize("dim", [40, 160])
def test_samples_and_heads_do_not_see_each_other(dim: int) -> None:
    """Each sample of a batch and the sample on its own: the same bits, in any company."""
    q, k, v = inputs(66, 70, dim, F16, "nchw", batch=3, heads=2)
    together = attention().forward(q, k, v)
    for b in range(3):
        alone = attention().forward(q[b : b + 1], k[b : b + 1], v[b : b + 1])
        assert torch.equal(bits(alone.out[0]), bits(together.out[b]))
        assert torch.equal(bits(alone.lse[0]), bits(together.lse[b]))


def test_nothing_to_do() -> None:
    q, k, v = inputs(0, 5, 8, F16)
    assert attention().forward(q, k, v).launches == []
    q, k, v = inputs(3, 5, 8, F16, batch=0)
    assert attention().forward(q, k, v).launches == []


# ------------------------------------------------------------------------------------------------- split over keys
@pytest.mark.parametrize(
    ("dim", "queries", "keys", "layout", "dtype"),
    [
        (40, 3, 1100, "nchw", F16),
        (40, 33, 1024, "bnhd", BF16),
        (160, 3, 1100, "bnhd", F16),
        (136, 33, 1024, "nchw", BF16),
    ],
)
def test_split_over_keys(dim: int, queries: int, keys: int, layout: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(queries, keys, dim, dtype, layout)
    run = run_and_check(q, k, v)
    assert [("combine" in launch["kernel"]) for launch in run.launches] == [False, True]
    assert run.launches[0]["grid"][0] == 2
    assert conflicts(run.launches[0]) == conflicts(run.launches[1]) == []
    # Enough heads: one range, much the same result.
    many = [t.expand(-1, 128, -1, -1) for t in (q, k, v)]
    whole = attention().forward(*many, complete=False, only_ctas=[0])
    assert len(whole.launches) == 1
    difference = (whole.out[:, :1].double() - run.out.double()).abs().max().item()
    assert difference <= 4 * STORE[dtype] * run.out.abs().max().item()
    assert (whole.lse[:, :1] - run.lse).abs().max() <= 1e-5


def test_a_split_does_not_depend_on_the_batch() -> None:
    q, k, v = inputs(2, 1030, 8, F16, batch=2)
    together = attention().forward(q, k, v)
    for b in range(2):
        alone = attention().forward(q[b : b + 1], k[b : b + 1], v[b : b + 1])
        assert torch.equal(bits(alone.out[0]), bits(together.out[b]))
        assert torch.equal(bits(alone.lse[0]), bits(together.lse[b]))


def test_ranges_of_infinities() -> None:
    """A range whose logits are all -inf takes no part in the sum over ranges; NaN reaches all of it."""
    q, k, v = inputs(2, 1100, 8, F16)
    q[...] = 1.0
    k[0, 0, :600, 0] = -math.inf
    check(attention().forward(q, k, v), q, k, v)
    k[0, 0, 1000, 0] = math.nan
    run = attention().forward(q, k, v)
    assert run.out.isnan().all()
    assert run.lse.isnan().all()


# --------------------------------------------------------------------------------------------- the machine's work
@pytest.mark.parametrize("layout", ["bnhd", "nchw"])
@pytest.mark.parametrize("dim", [32, 40, 64, 80, 128, 160, 512])
def test_no_bank_conflicts_and_minimum_traffic(dim: int, layout: str) -> None:
    """Aligned operands: each shared-memory access at full speed, each byte of global memory in 16-byte accesses."""
    queries, keys = 128, 128
    run = attention().forward(*inputs(queries, keys, dim, F16, layout))
    (launch,) = run.launches
    assert conflicts(launch) == []
    assert launch["shared"]["bank_conflicts"] == 0
    reads, writes = run.minimum_bytes()
    blocks = launch["grid"][0]
    unique = launch["unique_sectors"]
    assert unique["read_bytes"] == reads
    assert unique["write_bytes"] == writes
    assert launch["global_load"]["bytes"] == 0
    # Each block reads its own queries, and all keys and values.
    assert launch["global_cp_async"]["bytes"] == 2 * dim * (queries + 2 * keys * blocks)
    assert launch["global_cp_async"]["efficiency"] == 1.0
    assert launch["global_store"]["by_width"][16]["accesses"] == 2 * dim * queries // 16


@pytest.mark.parametrize(("dim", "least"), [(40, 0.085), (64, 0.11), (128, 0.125), (512, 0.09)])
def test_share_of_mma(dim: int, least: float) -> None:
    """Instructions of PTX, before ptxas drops moves: a bound against slow loops, not a rate of the machine."""
    launch = attention().forward(*inputs(128, 512, dim, F16)).launches[0]
    assert share(launch, "mma") > least
    assert launch["mma_flops"] == 4 * 128 * 512 * math.ceil(dim / 16) * 16  # 40 channels cost 48


# ------------------------------------------------------------------------------------------------- architectures
@pytest.mark.parametrize(
    ("arch", "dim", "layout"),
    [
        ("sm_75", 40, "nchw"),
        ("sm_75", 128, "bnhd"),
        ("sm_75", 160, "nchw"),
        ("sm_75", 512, "bnhd"),
        ("sm_90", 64, "bnhd"),
        ("sm_90", 512, "nchw"),
    ],
)
def test_other_architectures(arch: str, dim: int, layout: str) -> None:
    q, k, v = inputs(66, 72, dim, F16, layout)
    run = run_and_check(q, k, v, arch)
    assert run.launches[0]["shared"]["bank_conflicts"] == 0
    if arch == "sm_75" and dim > 128:  # half the queries of a block: that much less shared memory
        assert run.launches[0]["block"][0] == 128


def test_bfloat16_builds_for_the_oldest_architecture(tmp_path: Path) -> None:
    """The default build has 7.5 in it, where bfloat16 is refused at call time: its kernels must still link."""
    source = CUDA_CSRC / "cuda" / "attention_mma_bf16.cu"
    command = [
        "nvcc",
        *flags(),
        "-arch=sm_75",
        "-cubin",
        f"-I{CUDA_CSRC}",
        str(source),
        "-o",
        str(tmp_path / "cubin"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_limits() -> None:
    q, k, v = inputs(1, 1, 8, BF16)
    assert attention("sm_75").limit(q, k, v) == "bfloat16 attention needs compute capability 8.0"
    for arch, dtype in (("sm_80", BF16), ("sm_75", F16), ("sm_75", torch.float32)):
        q, k, v = (t.to(dtype) for t in (q, k, v))
        assert attention(arch).limit(q, k, v) is None
