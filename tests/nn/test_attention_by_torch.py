"""attention="torch": the blocks and the UNet in torch's operators alone, with the same weights and numbers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn import (
    SpatialCrossAttention,
    SpatialSelfAttention,
    UNet,
    UNetClassifier,
    UNetClassifierConfig,
    UNetConfig,
)

SMALL = UNetConfig(channels=8, blocks=1, heads=2, embedding=16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def awake(module: nn.Module) -> nn.Module:
    """The module with all its parameters random: the last layers start at zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.eval()


@contextlib.contextmanager
def only(kind: str) -> Iterator[None]:
    """Inside, the other's attention can not be called."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"not by {kind}")

    with pytest.MonkeyPatch.context() as patch:
        if kind == "torch":
            patch.setattr("diffkern.nn.attention.attention", refused)
            patch.setattr("diffkern.nn.attention.spatial_attention", refused)
        else:
            patch.setattr(F, "scaled_dot_product_attention", refused)
        yield


def both(module: nn.Module, switch: list[nn.Module], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients by diffkern's kernels, and by torch's, which call nothing else."""
    found = []
    for kind in ("diffkern", "torch"):
        for block in switch:
            block.attention = kind  # type: ignore[assignment]
        given = [x.clone().requires_grad_() for x in inputs]
        with only(kind):
            out = module(*given)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [*given, *module.parameters()])])
    return found[0], found[1]


def assert_near(ours: list[Tensor], torchs: list[Tensor]) -> None:
    """To float32's rounding of the largest number."""
    for a, b in zip(ours, torchs, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


@pytest.mark.parametrize("order", ["new", "legacy", "edm"])
@pytest.mark.parametrize("shape", [(2, 32, 17), (2, 32, 4, 5), (1, 32, 2, 3, 4)])
def test_self_attention(order: str, shape: tuple[int, ...]) -> None:
    block = awake(SpatialSelfAttention(32, 4, order=order))
    x = torch.randn(shape)
    assert_near(*both(block, [block], x))
    if len(shape) == 4:
        assert_near(*both(block, [block], x.to(memory_format=torch.channels_last)))


def test_cross_attention() -> None:
    block = awake(SpatialCrossAttention(32, 24, 2))
    assert_near(*both(block, [block], torch.randn(2, 32, 4, 5), torch.randn(2, 7, 24)))


def test_unet_switches_there_and_back() -> None:
    config = UNetConfig(**{**SMALL.to_dict(), "attention": "torch"})  # type: ignore[arg-type]
    model, x, t, cond = awake(UNet(SMALL)), torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([1, 10])
    assert isinstance(model, UNet)
    ours = model(x, t, cond)
    assert model.set_attention("torch") is model
    assert model.config == config
    with only("torch"):
        switched = model(x, t, cond)
    torch.testing.assert_close(switched, ours, rtol=1e-5, atol=1e-5)
    made = UNet(config).eval()
    made.load_state_dict(model.state_dict())
    assert torch.equal(made(x, t, cond), switched)
    assert torch.equal(model.set_attention("diffkern")(x, t, cond), ours)
    assert model.config == SMALL


def test_the_config_keeps_it_and_old_ones_load() -> None:
    config = UNet(SMALL).set_attention("torch").config
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["attention"] == "torch"
    assert UNetConfig.from_dict(stored) == config
    del stored["attention"]
    assert UNetConfig.from_dict(stored) == SMALL
    with pytest.raises(ValueError, match=r"UNetConfig\.attention must be one of 'diffkern', 'torch', got 'sdpa'"):
        UNetConfig.from_dict({**stored, "attention": "sdpa"})


def test_another_word_is_refused() -> None:
    sentence = r"attention must be one of diffkern, torch, got 'flash'"
    with pytest.raises(ValueError, match="^" + sentence):
        SpatialSelfAttention(32, attention="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^" + sentence):
        SpatialCrossAttention(32, 8, attention="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"UNetConfig\." + sentence):
        UNet(SMALL).set_attention("flash")  # type: ignore[arg-type]


def test_the_pool_of_a_classifier_switches_too() -> None:
    encoder = UNetConfig(**{**SMALL.to_dict(), "classes": 0})
    model = awake(UNetClassifier(UNetClassifierConfig(encoder, labels=3)))  # type: ignore[arg-type]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    ours = model(x, t)
    assert ours.std() > 0
    torch.testing.assert_close(model.set_attention("torch")(x, t), ours, rtol=1e-4, atol=1e-5)
    assert model.pool.attention == "torch"
