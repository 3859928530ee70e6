"""Layers in the place of a network's own that have no weight to look at, as quantised ones: they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkern.nn import DiT, DiTConfig, SpatialCrossAttention, UNet, UNetClassifier, UNetClassifierConfig
from diffkern.nn import UNetConfig as Config
from diffkern.nn.attention import AttentionPool

LAYERS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding
SMALL: dict[str, Any] = {"image_size": 8, "channels": 8, "multipliers": (1, 2), "blocks": 1, "groups": 4, "heads": 1}


class Packed(nn.Module):
    """A layer without parameters, buffers and attributes."""

    def __init__(self, layer: nn.Module, weight: Any = None) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        if weight is not None:
            object.__setattr__(self, "weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Integers(Packed):
    """A layer whose parameter is of integers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)


def by_method(layer: nn.Module) -> Packed:
    """As `torch.ao.nn.quantized`, whose weight is a method."""
    return Packed(layer, weight=lambda: None)


def dit() -> DiT:
    return DiT(DiTConfig(image_size=8, in_channels=1, patch=2, width=16, depth=1, heads=2, classes=3))


def unet() -> UNet:
    return UNet(Config(classes=3, attention_levels=(0,), **SMALL))


def unet_of_text() -> UNet:
    options = {
        "attention_levels": (1,),
        "transformer_depth": 1,
        "context_channels": 6,
        "classes": 0,
        "resample": "conv",
    }
    return UNet(Config(**SMALL, **options))  # type: ignore[arg-type]


def classifier() -> UNetClassifier:
    return UNetClassifier(UNetClassifierConfig(Config(classes=0, attention_levels=(1,), **SMALL), 5, "attention"))


def called(network: Any) -> Tensor:
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    config = getattr(network.config, "unet", network.config)
    if getattr(config, "context_channels", 0):
        out: Tensor = network(x, t, {"context": torch.ones(2, 5, 6)})
        return out
    out = network(x, t, torch.tensor([1, 3])) if config.classes else network(x, t)
    return out


@pytest.mark.parametrize("replaced", [Packed, Integers, by_method], ids=lambda f: str(f.__name__))
@pytest.mark.parametrize("made", [dit, unet, unet_of_text, classifier], ids=lambda f: str(f.__name__))
def test_every_layer_and_all_at_once(made: Callable[[], nn.Module], replaced: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    network = made().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    places = [
        (module, name, child)
        for module in network.modules()
        for name, child in module.named_children()
        if isinstance(child, LAYERS)
    ]
    assert len(places) > 6
    with torch.no_grad():
        wanted = called(network)
        for module, name, child in places:
            setattr(module, name, replaced(child))
            torch.testing.assert_close(called(network), wanted, rtol=1e-4, atol=1e-5)
            setattr(module, name, child)
        for module, name, child in places:
            setattr(module, name, replaced(child))
        torch.testing.assert_close(called(network), wanted, rtol=1e-4, atol=1e-5)
    out = called(network)  # with gradients, where adaptive layers keep their inputs alone
    torch.testing.assert_close(out.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_attention_blocks() -> None:
    torch.manual_seed(0)
    block = SpatialCrossAttention(32, 6, 2)
    nn.init.normal_(block.proj_out.weight)
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 5, 6)
    wanted = block(x, context)
    for name in ("q", "kv", "proj_out"):
        setattr(block, name, Packed(getattr(block, name)))
    torch.testing.assert_close(block(x, context), wanted)
    pool = AttentionPool(16, 32, 2, 5)
    wanted = pool(x)
    pool.qkv, pool.leave = Packed(pool.qkv), Packed(pool.leave)  # type: ignore[assignment]
    torch.testing.assert_close(pool(x), wanted)


@pytest.mark.filterwarnings("ignore")  # of torch.ao's age
def test_dynamic_quantisation_of_torch() -> None:
    torch.manual_seed(0)
    network = dit().eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        wanted = called(network)
        quantised = torch.ao.quantization.quantize_dynamic(network, {nn.Linear}, dtype=torch.qint8)
        assert not [m for m in quantised.modules() if type(m) is nn.Linear]
        found = called(quantised)
    assert 0 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_network_of_integers_alone_says_so() -> None:
    network = unet()
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if next(child.parameters(recurse=False), None) is not None:
                setattr(module, name, Packed(child))
    with pytest.raises(ValueError, match="the network must have a floating-point parameter or buffer, got none"):
        called(network)
