"""Where drop-ins leave attention to torch: bfloat16 with AMX where there is enough to multiply, and nowhere else."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from helpers.op_counter import EveryOp

from diffkern.compat.guided_diffusion import unet
from diffkern.compat.kit import kernels

processors, ours = Lazy("diffusers.models.attention_processor"), Lazy("diffkern.compat.diffusers")
BF16 = torch.bfloat16


@pytest.fixture(params=[False, True], ids=["no AMX", "AMX"])
def amx(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(kernels, "TORCH_HAS_AMX", request.param)
    return bool(request.param)


# D, queries, keys, layout -> whether torch is faster, read off the measured tables at a distance from the border.
CASES: dict[tuple[int, int, int, str], bool] = {
    (64, 64, 64, "heads"): True,
    (64, 1024, 1024, "heads"): True,
    (512, 4096, 4096, "heads"): True,
    (160, 256, 77, "heads"): True,
    (32, 256, 256, "heads"): True,
    (256, 256, 16, "heads"): True,
    (64, 8, 256, "heads"): True,
    (8, 1024, 1024, "heads"): False,
    (40, 4096, 77, "heads"): False,  # an odd number of keys
    (64, 256, 8, "heads"): False,
    (128, 4, 77, "heads"): False,
    (40, 16, 16, "heads"): False,
    (64, 1024, 1024, "nchw"): True,
    (64, 64, 64, "nchw"): False,
    (64, 256, 256, "channels_last"): True,
    (32, 49, 49, "channels_last"): False,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rule(case: tuple[int, int, int, str], amx: bool) -> None:
    assert kernels.torch_is_faster(BF16, *case) is (amx and CASES[case])
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert not kernels.torch_is_faster(dtype, *case)


def test_what_a_call_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TORCH_HAS_AMX", True)
    x = torch.zeros(1)
    assert kernels.why_torch(x, 64, 256, 256) is None
    with torch.autocast("cpu", BF16):
        assert kernels.why_torch(x, 64, 256, 256) == (
            "torch's attention is the faster one here (bfloat16 with AMX) "
            "for 256 queries, 256 keys and 64 channels a head"
        )
        assert kernels.why_torch(x.double(), 64, 256, 256) is None
    assert kernels.why_torch(x.bfloat16().to("meta"), 64, 256, 256) is None
    leaf = x.bfloat16().requires_grad_()
    assert kernels.why_torch(leaf, 64, 256, 256) is None  # a backward pass will follow
    with torch.no_grad():
        assert kernels.why_torch(leaf, 64, 256, 256) is not None


@needs("diffusers")
@torch.no_grad()
def test_a_layer_of_diffusers(amx: bool) -> None:
    """The op that runs, what is counted, and the numbers, for every processor's scale."""
    torch.manual_seed(0)
    for make, scale_qk in (("AttnProcessor", True), ("AttnProcessor", False), ("AttnProcessor2_0", True)):
        layer = processors.Attention(128, heads=2, dim_head=64, scale_qk=scale_qk, residual_connection=True).eval()
        layer.set_processor(getattr(processors, make)())
        x = torch.randn(1, 64, 128) / 4
        exact = layer.double()(x.double())
        layer.to(BF16)
        plain = layer(x.to(BF16))
        report = ours.accelerate(torch.nn.ModuleList([layer]))
        assert ("AMX" in str(report)) is amx
        with EveryOp() as counted:
            found = layer(x.to(BF16))
        assert counted.counts["diffkern.attention"] == (0 if amx else 1)
        error, theirs = ((t.double() - exact).abs().max() for t in (found, plain))
        assert error <= theirs + 2.0**-8 * exact.abs().max()
        calls = {"0": 1} if amx else {}
        assert {name.split(".")[-1]: sum(cases.values()) for name, cases in report.fallbacks.items()} == calls
        assert ("64 queries, 64 keys and 64 channels a head" in str(report)) is amx
        layer(x[:, :8].to(BF16))  # too few: not counted
        assert sum(sum(cases.values()) for cases in report.fallbacks.values()) == len(calls)


@pytest.mark.parametrize("kind", ["QKVAttention", "QKVAttentionLegacy"])
@pytest.mark.parametrize("channels_last", [False, True])
@torch.no_grad()
def test_guided_diffusion(kind: str, channels_last: bool, amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    monkeypatch.setattr(unet, "FALLBACKS", counts)
    layer: Any = getattr(unet, kind)(2)
    qkv = torch.randn(1, 384, 256, generator=torch.Generator().manual_seed(0))
    if channels_last:
        qkv = qkv.mT.contiguous().mT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with EveryOp() as counted:
            found = layer(qkv.to(BF16))
        few = layer(qkv[..., :16].to(BF16))
    assert counted.counts["diffkern.spatial_attention"] == (0 if amx else 1)
    assert sum(counts.values()) == amx
    for got, given in ((found, qkv), (few, qkv[..., :16])):
        want = layer(given.to(BF16).double())
        assert got.shape == want.shape
        assert (got.double() - want).abs().max() <= 2.0**-7 * want.abs().max()
