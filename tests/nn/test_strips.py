"""Residual blocks in strips of rows: the numbers of whole blocks, whatever the batch, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.autoencoder_cases import images, model, stirred
from torch import nn
from torch.nn import functional as F

from diffkern.nn import strips
from diffkern.nn.autoencoder_parts import Block


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(strips, "LEAST", 0)
    monkeypatch.setattr(strips, "STRIP", 1)  # two rows


def whole(block: Block, x: torch.Tensor) -> torch.Tensor:
    """In float64, by torch's operators."""
    p = {name: t.double() for name, t in block.state_dict().items()}

    def norm(name: str, h: torch.Tensor, groups: int) -> torch.Tensor:
        return F.silu(F.group_norm(h, groups, p[f"{name}.weight"], p[f"{name}.bias"], block.norm1.eps))

    x = x.double()
    h = F.conv2d(norm("norm1", x, block.norm1.num_groups), p["conv1.weight"], p["conv1.bias"], padding=1)
    h = F.conv2d(norm("norm2", h, block.norm2.num_groups), p["conv2.weight"], p["conv2.bias"], padding=1)
    return h + (F.conv2d(x, p["skip.weight"], p["skip.bias"]) if "skip.weight" in p else x)


@pytest.mark.parametrize("channels", [(8, 8), (16, 40), (40, 12)])
@pytest.mark.parametrize(("height", "width", "strip"), [(7, 5, 1), (16, 9, 4 * 40 * 9 * 4), (3, 4, 1 << 30), (1, 6, 1)])
@torch.no_grad()
def test_strips_are_the_block(
    channels: tuple[int, int], height: int, width: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "STRIP", strip)
    block = stirred(Block(*channels, groups=4, eps=1e-6))
    x = (torch.randn(2, channels[0], height, width) + 3.0).contiguous(memory_format=torch.channels_last)
    given = x.clone()
    assert strips.fits(block, x)
    found = block(x)
    assert torch.equal(x, given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), whole(block, x), rtol=1e-5, atol=2e-5)
    assert torch.equal(block(x[1:]), found[1:])


@torch.no_grad()
def test_a_mean_far_from_zero_costs_few_digits() -> None:
    norm = Block(8, 8, 2, 1e-6).norm1
    x = (torch.randn(1, 8, 9, 7) + 1000.0).contiguous(memory_format=torch.channels_last)
    line = strips.Affine(norm, x)
    torch.testing.assert_close(line.scale.double().flatten(), x.double().unflatten(1, (2, 4)).flatten(2).var(
        dim=2, correction=0).add(1e-6).rsqrt().repeat_interleave(4), rtol=1e-6, atol=0)  # fmt: skip


def test_whole_blocks_where_more_than_numbers_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(8, 8, 4, 1e-6, dropout=0.5).eval()
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert not strips.fits(block, x)  # gradients
    with torch.no_grad():
        assert strips.fits(block, x)
        assert not strips.fits(block.train(), x)
        block.eval()
        assert not strips.fits(block, x.contiguous())
        assert not strips.fits(block.double(), x.double())
        block.float()
        block.norm2.attention = "torch"
        assert not strips.fits(block, x)
        block.norm2.attention = "diffkern"
        handle = block.conv2.register_forward_hook(lambda *_: None)
        assert not strips.fits(block, x)
        handle.remove()
        monkeypatch.setattr(strips, "LEAST", x.nbytes + 1)
        assert not strips.fits(block, x)


@torch.no_grad()
def test_images_are_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    network: Any = model().eval()
    x = images(2, 32, 24)
    found = network(x)[0]
    monkeypatch.setattr(strips, "LEAST", 1 << 40)
    torch.testing.assert_close(found, network(x)[0], rtol=1e-4, atol=1e-5)


_PEAK = """
import sys, torch
from diffkern.nn import strips
from diffkern.nn.autoencoder_parts import Block
strips.LEAST = int(sys.argv[1])
def of(word):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(word)) / 1024
block = Block(64, 64, 8, 1e-6)
with torch.no_grad():
    block(torch.randn(1, 64, 64, 64).contiguous(memory_format=torch.channels_last))
    x = torch.randn(1, 512, 512, 64).permute(0, 3, 1, 2)
    open("/proc/self/clear_refs", "w").write("5")
    before = of("VmRSS")
    block(x)
print((of("VmHWM") - before) / 64)
"""


@pytest.mark.full
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not say peaks")
def test_beside_its_input_a_block_needs_its_output_and_strips() -> None:
    peaks = [
        float(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", _PEAK, str(least)],
                capture_output=True,
                text=True,
                check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
        )
        for least in (0, 1 << 40)
    ]
    assert peaks[0] < 2.7  # 64 MiB of output, a few strips of 12 MiB, and what malloc does not give back
    assert peaks[1] > 2.8


def test_skips_of_other_kinds_are_run_whole() -> None:
    block = Block(8, 8, 4, 1e-6)
    block.skip = nn.Sequential()
    with torch.no_grad():
        assert not strips.fits(block, torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last))
