"""diffusers' UNets as ours: the same output and gradients on random weights, and the same weights back."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import diffusers_networks as networks
from helpers.diffusers_networks import PUBLISHED, TINY, theirs
from helpers.lazy import Lazy, needs
from helpers.suites import few
from torch import Tensor, nn

from diffkern.nn import UNet, preset
from diffkern.nn.weights import diffusers as weights

diffusers = Lazy("diffusers")
pytestmark = needs("diffusers")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pair(config: dict[str, Any]) -> tuple[nn.Module, UNet]:
    """diffusers' network with random weights, and ours with the same."""
    original = networks.build(config)
    network = UNet(weights.config_from(config)).eval()
    weights.load(network, original.state_dict())
    return original, network


def ours(network: UNet, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
    """Our network, whose conditioning channels stand apart from x."""
    extra = network.config.concat_channels
    if extra:
        cond = {**cond, "image": x[:, -extra:]}
    out: Tensor = network(x[:, : x.shape[1] - extra], t, cond or None)
    return out


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_output_is_that_of_diffusers(config: dict[str, Any]) -> None:
    original, network = pair(config)
    x, t, cond = networks.inputs(config)
    with torch.no_grad():
        expected = theirs(original, x, t, cond)
        torch.testing.assert_close(ours(network, x, t, cond), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.05


def test_residuals_of_a_controlnet_enter_as_in_diffusers() -> None:
    config = TINY["sd 1"]
    original, network = pair(config)
    x, t, cond = networks.inputs(config)
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]  # what the first convolution and every part of the way down leave
    residuals = [torch.randn(2, channels, size, size) for channels, size in shapes]
    cond |= {"residuals": tuple(residuals), "middle_residual": torch.randn(2, 32, 4, 4)}
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, cond), theirs(original, x, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "sdxl"])
def test_gradients_are_those_of_diffusers(name: str) -> None:
    original, network = pair(TINY[name])
    x, t, cond = networks.inputs(TINY[name])
    theirs(original, x, t, cond).square().mean().backward()
    ours(network, x, t, cond).square().mean().backward()
    for parameter in network.parameters():
        parameter.data = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    moved = weights.export(network, linear_projection=TINY[name].get("use_linear_projection", False))
    for key, parameter in original.named_parameters():
        expected = parameter.grad
        assert expected is not None
        torch.testing.assert_close(moved[key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_export_gives_the_same_bits_back(config: dict[str, Any]) -> None:
    original, network = pair(config)
    state = original.state_dict()
    back = weights.export(network, linear_projection=config.get("use_linear_projection", False))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_names_of_2022_are_read() -> None:
    original, network = pair(TINY["ddpm"])
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in original.state_dict().items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        state[name] = tensor
    assert sum("query" in name for name in state) == 2 * 4
    again = UNet(network.config)
    weights.load(again, state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))


def test_every_name_that_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    original, network = pair(TINY["sd 1"])
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = dict(original.state_dict())
    del state["conv_in.weight"]
    state["extra"] = torch.zeros(1)
    state["conv_out.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match="weights must be") as caught:
        weights.load(network, state)
    for words in ("conv_in.weight is missing", "extra is unknown", r"conv_out.bias must have shape [4], got [7]"):
        assert words in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", few(PUBLISHED, "ddpm-cifar10", "sd-1"))
def test_published_networks_have_our_preset_its_size_and_a_place_for_every_tensor(name: str) -> None:
    config, size = PUBLISHED[name]
    with torch.device("meta"):
        original = getattr(diffusers, config["_class_name"]).from_config(config)
        network = UNet(preset(name))
    assert dataclasses.replace(network.config, dropout=0.0) == weights.config_from(config)
    assert sum(parameter.numel() for parameter in original.parameters()) == size
    assert sum(parameter.numel() for parameter in network.parameters()) == size
    moved = weights.export(network, linear_projection=config.get("use_linear_projection", False))
    assert {key: t.shape for key, t in moved.items()} == {key: t.shape for key, t in original.state_dict().items()}
