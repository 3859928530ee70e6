"""Options of the UNet and the classifier that single families of networks need."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn import UNet, UNetClassifier, UNetClassifierConfig, UNetConfig

SMALL = UNetConfig(image_size=4, channels=8, multipliers=(1, 2), blocks=1, attention_levels=(), heads=1, classes=3)


def test_the_first_convolution_has_a_width_of_its_own() -> None:
    network = UNet(dataclasses.replace(SMALL, enter_channels=12))
    assert network.enter.out_channels == 12
    assert network.down[0].blocks[0].block.conv1.in_channels == 12
    assert network.up[-1].blocks[-1].block.conv1.in_channels == 8 + 12
    assert network(torch.zeros(2, 1, 4, 4), torch.zeros(2)).shape == (2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"UNetConfig\.enter_channels must be at least 1, got 0"):
        dataclasses.replace(SMALL, enter_channels=0)


def test_a_class_embedding_is_scaled_and_its_bias_is_added_to_none_too() -> None:
    network = UNet(dataclasses.replace(SMALL, class_scale=2.0, class_bias=True))
    plain = UNet(dataclasses.replace(SMALL, classes=0))
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("class")})
    torch.nn.init.normal_(network.class_bias)
    t, classes = torch.tensor([1.0, 5.0]), torch.tensor([2, 3])  # 3 is none
    change = network.embed(t, classes, 2) - plain.embed(t, None, 2)
    torch.testing.assert_close(change, 2.0 * network.classes.weight[classes] + network.class_bias)


def test_pooling_every_block_is_two_layers_over_all_means() -> None:
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([1.0, 5.0])
    for pool in ("spatial", "spatial_v2"):
        network = UNetClassifier(UNetClassifierConfig(dataclasses.replace(SMALL, classes=0), 5, pool))
        known = network.known(t, None, 2)
        h, outputs = network.encode(x, {}, iter(known.changes), iter(known.contexts))
        means = torch.cat([output.mean((2, 3)) for output in [*outputs, h]], dim=1)
        assert means.shape[1] == 8 + 8 + 8 + 16 + 16  # the first convolution, a block, halved, a block, the middle
        hidden = network.pool[0](means)
        hidden = F.relu(hidden) if pool == "spatial" else F.silu(F.group_norm(hidden, 8, eps=1e-5))
        torch.testing.assert_close(network(x, t), network.pool[-1](hidden))


@pytest.mark.parametrize("resample", ["residual", "conv"])
@torch.no_grad()
def test_an_upsampled_image_is_not_made_for_its_convolution(resample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to repetition and convolution, which a hook on the layer asks for."""
    torch.manual_seed(0)
    config = UNetConfig(
        image_size=8,
        channels=32,
        multipliers=(1, 1),
        blocks=1,
        heads=1,
        attention_levels=(),
        resample=resample,
        classes=0,
    )  # type: ignore[arg-type]
    model, made = UNet(config).eval(), []
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([5])
    interpolate = F.interpolate

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.append(args[0].shape)
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(F, "interpolate", counted)
    small = model(x, t)
    skips = 1 if resample == "residual" else 0  # the other branch of the residual block
    assert made == [(1, 32, 4, 4)] * skips
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_: None)
    usual = model(x, t)
    assert len(made) == skips + 1 + skips
    torch.testing.assert_close(small, usual, rtol=1e-5, atol=1e-5)
