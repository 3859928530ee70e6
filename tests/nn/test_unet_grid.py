"""Every option of the UNet: shapes, what the output depends on, samples apart, layouts, empty batches, NaN."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.unet_cases import OPTIONS, SMALL, awake, config, inputs, of
from torch import Tensor
from torch.nn import functional as F

from diffkern.nn import ConvNeXtBlock, UNet, UNetConfig, attention, norm, transformer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_the_output_has_its_shape_and_depends_on_everything(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        out = network(x, t, cond)
        assert out.shape == (2, network.config.predicted_channels, 8, 8)
        assert out.is_contiguous()
        others = [(x + 0.1, t, cond), (x, t + 0.3, cond)]
        for name, value in (cond or {}).items():
            changed = (value + 1) % 5 if name == "class" else value + 0.3
            others.append((x, t, {**(cond or {}), name: changed}))
        for other in others:
            assert (network(*other) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("name", ["learned variance", "FIR", "transformer", "vector and numbers", "ConvNeXt"])
def test_samples_do_not_see_each_other(name: str) -> None:
    network = awake(config(**OPTIONS[name])).double()
    x, t, cond = inputs(network.config)
    x = x.double()
    cond = cond and {name: value.double() if value.is_floating_point() else value for name, value in cond.items()}
    with torch.no_grad():
        out = network(x, t, cond)
        for i in range(2):
            alone = network(x[i : i + 1], t[i : i + 1], of(cond, i))
            torch.testing.assert_close(alone[0], out[i], rtol=1e-12, atol=1e-12)


def test_our_ops_inside_give_a_sample_the_same_bits_alone_and_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and attention, as the network calls them; torch's convolutions may sum in another order."""
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = []
    for module in (norm, attention, transformer):
        for name in ("group_norm_act", "spatial_attention", "attention"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recorded(getattr(module, name), calls))
    for changes in ({}, OPTIONS["transformer"]):
        network = awake(config(**changes))
        with torch.no_grad():
            network(*inputs(network.config, batch=3))
    assert {getattr(op, "__name__", "") for op, *_ in calls} == {"group_norm_act", "spatial_attention", "attention"}
    with torch.no_grad():
        for op, args, kwargs, out in calls:
            for i in range(3):
                one = [value[i : i + 1] if batched(value) else value for value in args]
                named = {name: value[i : i + 1] if batched(value) else value for name, value in kwargs.items()}
                assert torch.equal(op(*one, **named), out[i : i + 1])


def batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def recorded(op: Any, calls: list[Any]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = op(*args, **kwargs)
        calls.append((op, args, kwargs, out.clone()))
        return out

    return run


@pytest.mark.parametrize("name", ["three levels, blocks by level", "FIR", "transformer", "classes before", "Fourier"])
def test_config_and_weights_survive_json_and_a_state_dict(name: str) -> None:
    network = awake(config(**OPTIONS[name]))
    again = UNet(UNetConfig.from_dict(json.loads(json.dumps(network.config.to_dict())))).eval()
    again.load_state_dict(network.state_dict())
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        assert torch.equal(again(x, t, cond), network(x, t, cond))


@pytest.mark.parametrize(("levels", "divisor"), [(1, 1), (2, 2), (3, 4)])
def test_odd_sizes_say_what_they_must_be_divisible_by(levels: int, divisor: int) -> None:
    network = UNet(config(multipliers=(1,) * levels, attention_levels=(), heads=1))
    t = torch.tensor([0.5])
    for height, width in ((3 * divisor, 5 * divisor), (divisor, divisor)):
        assert network(torch.randn(1, 3, height, width), t).shape == (1, 3, height, width)
    for shape in ((1, 3, 3 * divisor, 4 * divisor + 1), (1, 3, 0, divisor)):
        if divisor > 1 or 0 in shape:
            with pytest.raises(ValueError, match=rf"height and width of x must be divisible by {divisor}, got"):
                network(torch.zeros(shape), t)


@pytest.mark.parametrize("changes", [{}, OPTIONS["transformer"], OPTIONS["ConvNeXt"], OPTIONS["image"]], ids=str)
def test_the_result_has_the_layout_of_x(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        out, last = network(x, t, cond), network(x.to(memory_format=torch.channels_last), t, cond)
    assert out.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, last)


@pytest.mark.parametrize("changes", [{}, OPTIONS["transformer"], OPTIONS["classes"], OPTIONS["FIR"]], ids=str)
def test_an_empty_batch_gives_an_empty_batch(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    x, t, cond = inputs(network.config)
    empty = cond and {name: value[:0] for name, value in cond.items()}
    x = x[:0].requires_grad_()
    out = network(x, t[:0], empty)
    assert out.shape == (0, 3, 8, 8)
    out.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("changes", [{}, OPTIONS["transformer"], OPTIONS["ConvNeXt"]], ids=str)
def test_nan_stays_in_its_sample_and_is_not_lost(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        clean = network(x, t, cond)
        x[0, 0, 3, 3] = math.nan
        out = network(x, t, cond)
        assert out[0].isnan().all()
        torch.testing.assert_close(out[1], clean[1])
        t[1] = math.nan
        assert network(x, t, cond).isnan().all()


def test_a_convnext_block_is_its_formula() -> None:
    for modulation in ("scale_shift", "add"):
        block = ConvNeXtBlock(6, 8, 16, modulation=modulation, zero_init=False)  # type: ignore[arg-type]
        x, change = torch.randn(2, 6, 5, 5), torch.randn(2, 12 if modulation == "scale_shift" else 6)
        h = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=3, groups=6)
        first, second = (change[:, i : i + 6, None, None] for i in (0, 6))
        h = h if modulation == "scale_shift" else h + first
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        h = h * (1 + first) + second if modulation == "scale_shift" else h
        h = torch.einsum("oc,bchw->bohw", block.conv1.weight[..., 0, 0], h) + block.conv1.bias[:, None, None]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        h = torch.einsum("oc,bchw->bohw", block.conv2.weight[..., 0, 0], h) + block.conv2.bias[:, None, None]
        torch.testing.assert_close(block(x, change), block.skip(x) + h, rtol=1e-5, atol=1e-5)


def test_what_depends_not_on_x_is_known_beforehand() -> None:
    network = awake(config(**OPTIONS["transformer"], classes=5))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        known = network.known(t, cond, 2)
        assert len(known.changes) == network.config.stages
        assert len(known.contexts) == 1 + 1 + 2  # down, the middle, up
        assert torch.equal(network.run(x, known, cond), network(x, t, cond))


def test_a_network_starts_at_zero_and_its_blocks_as_their_skips() -> None:
    network = UNet(config(**OPTIONS["transformer"]))
    x, t, cond = inputs(network.config)
    assert not network(x, t, cond).any()
    assert UNet(UNetConfig(**{**SMALL, "zero_init": False}))(x, t).any()
