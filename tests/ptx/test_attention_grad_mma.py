"""Backward attention in float16 and bfloat16: csrc/cuda/attention_grad_mma*, through cuda::attention_grad."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from ptx.attention_harness import Attention, Gradients, Run, check, conflicts, exact, place, random, share
from ptx.harness import bits
from torch import Tensor

pytestmark = pytest.mark.full  # test_every_op.py has each op once

F16, BF16 = torch.float16, torch.bfloat16
TOKENS, CHANNELS = "bnhd", "nchw"  # what is in rows: [B, N, H, D] or [B, H, D, N]
GRADIENTS = ("dq", "dk", "dv")
ROWS = 64  # of a block, for head dims up to 256


@functools.cache
def kernels(arch: str = "sm_80") -> Attention:
    return Attention(arch)


class Case:
    """Inputs of one call and its two references, all in plain layout."""

    def __init__(
        self,
        dtype: torch.dtype,
        queries: int,
        keys: int,
        dim: int,
        batch: int = 1,
        heads: int = 1,
        std: float = 1.0,
        scale: float | None = None,
    ) -> None:
        self.q = random(1, batch, heads, queries, dim, dtype=dtype, std=std)
        self.k = random(2, batch, heads, keys, dim, dtype=dtype)
        self.v = random(3, batch, heads, keys, dim, dtype=dtype)
        self.grad = random(4, batch, heads, queries, dim, dtype=dtype)
        self.scale = scale

    @functools.cached_property
    def exact(self) -> Gradients:
        return exact(self.q, self.k, self.v, self.grad, self.scale)

    def run(self, *layouts: str, arch: str = "sm_80", grad: Tensor | None = None, **options: Any) -> Run:
        """layouts: of q, k, v and grad_out, or one for all."""
        q, k, v, g = layouts if len(layouts) == 4 else layouts * 4
        out = place(self.exact.out.to(self.q.dtype), q.removeprefix("expanded "))
        return kernels(arch).backward(
            place(self.q, q),
            place(self.k, k),
            place(self.v, v),
            out,
            place(self.grad, g) if grad is None else grad,
            self.exact.lse.float(),
            self.scale,
            **options,
        )

    def check(self, run: Run) -> None:
        check(run, GRADIENTS, self.q, self.k, self.v, self.grad, self.scale)


def same_bits(one: Run, two: Run) -> None:
    for name in GRADIENTS:
        assert torch.equal(bits(getattr(one, name)), bits(getattr(two, name))), name


# ------------------------------------------------------------------------------------------------------ accuracy
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("dim", [8, 40, 64, 72, 80, 128, 160, 256, 512])
def test_head_dims(dtype: torch.dtype, dim: int) -> None:
    """Every class of head dims, whole steps of 16 channels and half ones, in both orders: the same bits."""
    case = Case(dtype, 40 if dim == 512 else 72, {512: 24, 256: 72, 160: 72}.get(dim, 136), dim)
    tokens = case.run(TOKENS)
    case.check(tokens)
    same_bits(tokens, case.run(CHANNELS))


@pytest.mark.parametrize("layout", [TOKENS, CHANNELS])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 77, 130])
def test_token_tails(layout: str, tokens: int) -> None:
    case = Case(F16 if tokens % 2 else BF16, tokens, tokens, 40)
    case.check(case.run(layout))


@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(65, 77, 64), (64, 1, 24), (1, 130, 64), (200, 16, 72), (49, 77, 160)]
)
@pytest.mark.parametrize("of_keys", [TOKENS, CHANNELS])
def test_cross_attention(of_keys: str, queries: int, keys: int, dim: int) -> None:
    """Queries are an image, keys are text: each side in its own order."""
    of_queries = CHANNELS if of_keys == TOKENS else TOKENS
    case = Case(BF16, queries, keys, dim)
    case.check(case.run(of_queries, of_keys, of_keys, of_queries))


@pytest.mark.parametrize(
    "layouts",
    [
        ("nchw+1", "nchw+3", "nchw+5", "nchw+7"),
        ("bhnd+1", "bnhd+1", "bhnd/5", "bhnd/3+1"),
        ("bnhd", "bnhd", "bnhd", "nchw"),
        ("nchw", "nchw", "bnhd", "bhnd+1"),
        ("bhnd", "nchw/8", "bhnd+8", "nchw/4"),
        ("expanded bnhd", "expanded nchw", "expanded bhnd+1", "expanded nchw"),
    ],
    ids=" ".join,
)
def test_layouts(layouts: tuple[str, str, str, str]) -> None:
    """Any order and alignment gives the bits of the aligned layout."""
    case = Case(F16, 72, 80, 40, heads=2)
    if layouts[0].startswith("expanded"):
        for name in ("q", "k", "v", "grad"):
            one = getattr(case, name)
            setattr(case, name, one[:, :1].expand_as(one))
    aligned = case.run(TOKENS)
    case.check(aligned)
    same_bits(aligned, case.run(*layouts))


@pytest.mark.parametrize("layout", [TOKENS, CHANNELS])
def test_gradients_of_any_strides(layout: str) -> None:
    """out.sum() hands back one number with strides of 0; a slice has none of 1."""
    case = Case(BF16, 70, 66, 40)
    case.grad = torch.ones((), dtype=BF16).expand_as(case.q)
    case.check(case.run(layout, grad=case.grad))
    case.grad = random(5, 1, 1, 140, 120, dtype=BF16)[:, :, ::2, ::3]
    case.check(case.run(layout, grad=case.grad))


def test_large_logits() -> None:
    """Logits in the hundreds: no overflow, no NaN."""
    case = Case(F16, 66, 72, 64, std=30.0, scale=0.5)
    run = case.run(CHANNELS)
    assert case.exact.lse.max() > 200
    case.check(run)


def test_one_key_has_no_gradient() -> None:
    """The softmax of one logit is 1 whatever the logit."""
    case = Case(BF16, 5, 1, 64, heads=2)
    run = case.run(TOKENS)
    assert not run.dq.any()
    assert not run.dk.any()


def test_no_queries() -> None:
    case = Case(F16, 0, 9, 24)
    run = case.run(TOKENS)
    assert not run.dk.any()
    assert not run.dv.any()


@pytest.mark.parametrize(("name", "token"), [("q", 3), ("k", 70), ("v", 0), ("grad", 65)])
def test_nan(name: str, token: int) -> None:
    """NaN is where the formula has it."""
    case = Case(BF16, 72, 76, 40)
    getattr(case, name)[0, 0, token, 9] = float("nan")
    run = case.run(CHANNELS)
    for gradient in GRADIENTS:
        assert torch.equal(getattr(run, gradient).isnan(), getattr(case.exact, gradient).isnan()), gradient
    assert run.dq.isnan().any()


# ------------------------------------------------------------------------------------------------- independence
@pytest.mark.parametrize(("layout", "tokens"), [(TOKENS, 72), (CHANNELS, 63)])
def test_batch_composition(layout: str, tokens: int) -> None:
    """A sample has the same bits alone and among others. (63 tokens: only some heads are aligned.)"""
    case = Case(F16, tokens, tokens, 40, batch=3, heads=2)
    together = case.run(layout)
    for sample in (0, 2):
        alone = Case(F16, tokens, tokens, 40)
        for name in ("q", "k", "v", "grad"):
            setattr(alone, name, getattr(case, name)[sample : sample + 1])
        run = alone.run(layout)
        for name in GRADIENTS:
            assert torch.equal(bits(getattr(together, name)[sample : sample + 1]), bits(getattr(run, name))), name


def test_many_heads() -> None:
    case = Case(BF16, 20, 12, 16, batch=2, heads=3)
    case.check(case.run(CHANNELS, TOKENS, TOKENS, CHANNELS))


# ------------------------------------------------------------------------------------------------- architectures
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_architectures(arch: str) -> None:
    """sm_75: copies that wait, one stage, products of 16 x 8 x 8."""
    for dim, layouts in ((40, (TOKENS,)), (64, (CHANNELS, TOKENS, TOKENS, CHANNELS)), (128, (CHANNELS,))):
        case = Case(BF16 if arch != "sm_75" and dim == 40 else F16, 72, 72, dim)
        case.check(case.run(*layouts, arch=arch))
    if arch != "sm_75":
        case = Case(BF16, 64, 64, 256)
        case.check(case.run(TOKENS, arch=arch))


def test_limits() -> None:
    def limit(dtype: torch.dtype, dim: int, arch: str) -> str | None:
        q = torch.empty(1, 1, 4, dim, dtype=dtype)
        lib = kernels()
        lib.arch, before = arch, lib.arch
        try:
            return lib.limit(q, q, q, backward=True)
        finally:
            lib.arch = before

    for dtype in (F16, BF16, torch.float32):
        assert limit(dtype, 512, "sm_80") is None
    assert limit(F16, 128, "sm_75") is None
    assert "head dim above 128" in (limit(F16, 136, "sm_75") or "")
    assert "bfloat16" in (limit(BF16, 64, "sm_75") or "")
    assert "head dim of 512" in (limit(torch.float32, 512, "sm_75") or "")
    assert limit(torch.float32, 256, "sm_75") is None
    assert "CPU" in (limit(torch.float64, 64, "sm_80") or "")
    assert "7.5" in (limit(F16, 64, "sm_70") or "")


# --------------------------------------------------------------------------------------------------------- costs
def products(dim: int, tokens: int, of: int) -> int:
    """Multiplications and additions of `of` products of tokens x tokens x dim."""
    return of * 2 * tokens * tokens * ((dim + 15) // 16 * 16)


@pytest.mark.parametrize("layout", [TOKENS, CHANNELS])
@pytest.mark.parametrize("dim", [40, 64, 128, 256])
def test_costs(dim: int, layout: str) -> None:
    """Aligned whole tiles: no bank conflict, only the products that the formula has (head dims rounded up to 16), every
    access 16 bytes wide, rows read once and columns once for each tile of rows."""
    tokens = 128
    case = Case(F16, tokens, tokens, dim)
    run = case.run(layout)
    expected = (
        {"Role)0": (3, 1), "Role)1": (4, 2)} if dim <= 128 else {"Role)0": (3, 1), "Role)2": (3, 1), "Role)3": (2, 1)}
    )
    size = tokens * dim * 2
    assert len(run.launches) == 1 + len(expected)
    for role, (gemms, outputs) in expected.items():
        launch = run.launch(f"(dk::cuda::grad::{role}")
        assert conflicts(launch) == []
        assert launch["mma_flops"] == products(dim, tokens, gemms)
        rows = 2 if role != "Role)3" else 1  # dv has no use for v
        copied = launch["global_cp_async"]
        terms = 0 if role == "Role)0" else tokens // ROWS * tokens * 8
        assert copied["bytes"] == rows * size + 2 * tokens // ROWS * size + terms
        assert copied["efficiency"] == 1
        stored = launch["global_store"]
        assert stored["bytes"] == outputs * size
        assert stored["efficiency"] == 1
        assert set(stored["by_width"]) == {16}
        assert launch["unique_sectors"]["read_bytes"] == (2 + rows) * size + tokens * 8
        assert share(launch, "mma") > (0.07 if dim == 40 else 0.09)
