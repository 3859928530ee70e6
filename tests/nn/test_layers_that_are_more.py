"""Layers in the place of a network's own: LoRA, hooks, kept results, filters on the meta device, tied layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.nn import SpatialSelfAttention, UNet, UNetConfig
from diffkern.nn.adaptive import gelu_linear

CONFIG = UNetConfig(channels=8, blocks=1, heads=1, attention_levels=(1,), classes=4, zero_init=False)


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 1, 8, 8), torch.tensor([3, 700])


class Added(nn.Module):
    """LoRA's form: the layer, and a branch of its own."""

    def __init__(self, base: nn.Conv1d) -> None:
        super().__init__()
        self.base, self.branch = base, nn.Conv1d(base.in_channels, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.branch(x)
        return out


def test_a_layer_of_attention_that_is_more_is_called(network: UNet) -> None:
    x, t = inputs()
    before = network(x, t)
    for module in network.modules():
        if isinstance(module, SpatialSelfAttention):
            module.qkv, module.proj_out = Added(module.qkv), Added(module.proj_out)  # type: ignore[assignment]
    after = network(x, t)
    assert (after - before).abs().max() > 1e-3
    after.square().sum().backward()
    branches = [m.branch for m in network.modules() if isinstance(m, Added)]
    assert all(branch.weight.grad is not None for branch in branches)


def test_what_a_hook_kept_of_the_last_convolution_stays(network: UNet) -> None:
    x, t = inputs()
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def keep(module: nn.Module, given: object, out: Tensor) -> None:
        kept.append(out)
        copies.append(out.clone())

    network.middle[0].block.conv2.register_forward_hook(keep)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        network(x, t)
    assert torch.equal(kept[0], copies[0])


def test_full_backward_hooks_and_other_last_layers(network: UNet) -> None:
    x, t = inputs()
    seen: list[int] = []
    block = network.middle[0].block
    block.conv2.register_full_backward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr, operator]
    network.middle[1].block.conv2 = nn.Sequential(network.middle[1].block.conv2, nn.Tanh())  # type: ignore[union-attr]
    network(x, t).square().sum().backward()
    assert seen == [1]


@pytest.mark.parametrize("options", [{"resample": "residual"}, {"resample": "pool"}, {"input_skips": "residual"}])
def test_a_network_with_filters_made_on_meta(options: dict[str, str]) -> None:
    config = UNetConfig(**{**CONFIG.to_dict(), "filter": (1.0, 3.0, 3.0, 1.0), **options})
    made = UNet(config).eval()
    with torch.device("meta"):
        empty = UNet(config).eval()
    empty.load_state_dict(made.state_dict(), assign=True)
    x, t = inputs()
    assert torch.equal(empty(x, t), made(x, t))


def test_gradients_of_a_layer_that_is_used_twice() -> None:
    torch.manual_seed(0)
    layer, u = nn.Linear(8, 8).double(), torch.randn(2, 3, 8, dtype=torch.float64)

    def plain(u: Tensor) -> Tensor:
        out: Tensor = layer(nn.functional.gelu(u, approximate="tanh"))
        return out

    found = torch.autograd.grad(
        gelu_linear(gelu_linear(u, layer), layer).square().sum(), [layer.weight, layer.bias], create_graph=True
    )
    expected = torch.autograd.grad(plain(plain(u)).square().sum(), [layer.weight, layer.bias])
    torch.testing.assert_close(found, expected)


def test_times_of_sixteen_bits_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    network = UNet(UNetConfig(**{**CONFIG.to_dict(), "time_scale": 1000.0})).eval()
    x, _ = inputs()
    t = torch.tensor([0.7, 0.33], dtype=torch.bfloat16)
    assert torch.equal(network(x, t), network(x, t.float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_classes_of_any_integer_dtype(network: UNet, dtype: torch.dtype) -> None:
    x, t = inputs()
    classes = torch.tensor([1, 3])
    assert torch.equal(network(x, t, classes.to(dtype)), network(x, t, classes))


def test_conditions_that_nobody_counts_writes_to_are_read_at_every_call(network: UNet) -> None:
    plan = diffkern.ddim(diffkern.linear(20), 4)
    results = []
    for prepare in (True, False):
        with torch.inference_mode():
            cond = torch.tensor([0, 3])

            def edited(info: object, cond: Tensor = cond) -> None:
                cond.add_(1).remainder_(5)

            x, _ = inputs()
            results.append(diffkern.sample(network, x, plan, cond=cond, callback=edited, prepare=prepare))
    assert torch.equal(*results)
