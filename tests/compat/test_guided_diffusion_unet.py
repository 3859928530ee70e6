"""compat.guided_diffusion's attention layers and helpers beside a transcription, and beside the original if there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.op_counter import EveryOp
from mini_guided_diffusion import nn as stub_nn
from mini_guided_diffusion import unet as stub
from torch import Tensor

from diffkern.compat import guided_diffusion as ours
from diffkern.compat.guided_diffusion import unet

KINDS = ("QKVAttention", "QKVAttentionLegacy")
SHAPES = [(2, 4, 8, 16), (1, 1, 64, 49), (3, 2, 40, 64), (1, 8, 256, 4), (2, 1, 512, 9), (2, 3, 16, 1)]
"""N, heads, channels of a head, T."""


def qkv_of(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    n, heads, dim, length = shape
    z = torch.randn(n, 3 * heads * dim, length, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return z.to(dtype)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(kind: str, shape: tuple[int, int, int, int]) -> None:
    layer, plain = getattr(ours, kind)(shape[1]), getattr(stub, kind)(shape[1])
    exact = plain(qkv_of(shape, torch.float64))
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        found = layer(qkv_of(shape, dtype))
        assert found.dtype == dtype
        assert found.shape == exact.shape
        assert apart(found, exact) <= bound
    for half in (torch.float16, torch.bfloat16):
        found, want = layer(qkv_of(shape, half)), plain(qkv_of(shape, half))
        assert found.dtype == half
        exact_half = plain(qkv_of(shape, half).double())
        assert apart(found, exact_half) <= apart(want, exact_half) + torch.finfo(half).eps / 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind: str) -> None:
    shape = (2, 3, 16, 10)
    grads = []
    for layer in (getattr(ours, kind)(3), getattr(stub, kind)(3)):
        x = qkv_of(shape, torch.float64).requires_grad_()
        layer(x).square().sum().backward()
        grads.append(x.grad)
    assert apart(*grads) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_strides(kind: str) -> None:
    """As a convolution writes it, channels last, part of a larger tensor, and with no contiguous axis."""
    whole = torch.randn(4, 2 * 96, 2 * 10, generator=torch.Generator().manual_seed(1))
    layer, plain = getattr(ours, kind)(4), getattr(stub, kind)(4)
    for x in (
        whole[:2, :96, :10].contiguous(),
        whole[::2, 96:, 10:],
        whole[:2, :96, :10].transpose(1, 2).contiguous().transpose(1, 2),
        whole[:, ::2, ::2],
        whole[:1].expand(3, -1, -1)[:, :96],
    ):
        assert x.shape[1] == 96
        assert apart(layer(x), plain(x)) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_one_op(kind: str) -> None:
    x = qkv_of((2, 4, 8, 16))
    with torch.no_grad(), EveryOp() as counted:
        getattr(ours, kind)(4)(x)
    assert counted.counts == {"diffkern.spatial_attention": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 12])
@pytest.mark.full
def test_compiled(kind: str, dim: int) -> None:
    """One graph, with and without a kernel for the heads."""
    x = qkv_of((2, 2, dim, 6))
    compiled = torch.compile(getattr(ours, kind)(2), fullgraph=True, backend="eager")
    assert apart(compiled(x), getattr(stub, kind)(2)(x)) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [4, 12, 260, 384])
def test_other_heads_run_on_torch(kind: str, dim: int) -> None:
    """Said in a warning and counted."""
    shape = (2, 2, dim, 6)
    reason = f"the channels of a head must be a multiple of 8 up to 256, or 512, got {dim}"
    before = unet.FALLBACKS[reason]
    with pytest.warns(RuntimeWarning, match=f"attention runs on torch's own kernels: {reason}"):
        found = getattr(ours, kind)(2)(qkv_of(shape))
    assert unet.FALLBACKS[reason] == before + 1
    assert apart(found, getattr(stub, kind)(2)(qkv_of(shape, torch.float64))) <= 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_no_state(kind: str) -> None:
    layer = getattr(ours, kind)(n_heads=4)
    assert layer.n_heads == 4
    assert not layer.state_dict()
    assert not list(layer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(ours, kind)(4)(qkv_of((2, 4, 8, 16))).dtype == torch.bfloat16
        assert getattr(stub, kind)(4)(qkv_of((2, 4, 8, 16))).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind: str) -> None:
    layer = getattr(ours, kind)(4)
    with pytest.raises(AssertionError, match="the channels of qkv must be a multiple of 3 x 4 heads, got 50"):
        layer(torch.zeros(1, 50, 6))
    with pytest.raises(ValueError, match=r"qkv must have shape \[N, 3 H C, T\], got \[1, 96, 4, 4\]"):
        layer(torch.zeros(1, 96, 4, 4))
    with pytest.raises(AssertionError, match="3 x 0 heads"):
        getattr(ours, kind)(0)(torch.zeros(1, 96, 4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_tuple", [False, True])
def test_count_flops(kind: str, as_tuple: bool) -> None:
    y: Any = torch.zeros(2, 32, 7)
    y = (y,) if as_tuple else y

    counted, wanted = (SimpleNamespace(total_ops=torch.ones(1, dtype=torch.float64)) for _ in range(2))
    getattr(ours, kind).count_flops(counted, None, y)
    stub.count_flops(wanted, None, y)
    assert torch.equal(counted.total_ops, wanted.total_ops)
    assert float(counted.total_ops) == 1 + (2 * 2 * 49 * 32 if as_tuple else 2 * 32 * 7)


@pytest.mark.parametrize("dim", [2, 7, 32, 33])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.float16])
def test_timestep_embedding(dim: int, dtype: torch.dtype) -> None:
    t = torch.tensor([0.0, 3.0, 501.0, 999.0]).to(dtype)
    found = ours.timestep_embedding(t, dim)
    assert found.dtype == torch.float32
    assert found.shape == (4, dim)
    torch.testing.assert_close(found, stub_nn.timestep_embedding(t, dim), rtol=0, atol=1e-4)  # sin(999 f): f's last bit
    assert not dim % 2 or not found[:, -1].any()
    assert ours.timestep_embedding(t, 1).tolist() == [[0.0]] * 4
    short = ours.timestep_embedding(t, dim, max_period=100)
    torch.testing.assert_close(short, stub_nn.timestep_embedding(t, dim, 100), rtol=0, atol=1e-4)


def test_timestep_embedding_bad_input() -> None:
    with pytest.raises(ValueError, match=r"timesteps must have shape \[N\], got \[2, 1\]"):
        ours.timestep_embedding(torch.zeros(2, 1), 8)


def test_mean_flat() -> None:
    x = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(ours.mean_flat(x), x.flatten(1).mean(1))
    assert ours.mean_flat(x[:, 0, 0, 0]).shape == ()  # as the original's
