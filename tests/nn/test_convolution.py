"""Which convolutions of the networks run by `ops.conv3x3`, and that they are the same function."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffkern import _load
from diffkern.nn.convolution import Packed, convolve, freeze, is_ours

functorch, prune = Lazy("torch.func"), Lazy("torch.nn.utils.prune")
pytestmark = pytest.mark.skipif(_load.build_info().get("isa") == "scalar", reason="needs a processor with AVX2")


def layer(inputs: int = 16, outputs: int = 32, size: int = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(inputs, outputs, size, **{"padding": 1, **options})


def image(batch: int = 2, channels: int = 16, height: int = 8, width: int = 8) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, channels, height, width)


def test_three_by_three_float32_on_the_cpu_is_ours_from_the_least_sizes_on() -> None:
    assert is_ours(layer(), image())
    assert is_ours(layer(bias=False), image(1, 16, 4, 16))
    assert is_ours(layer(), image(height=4, width=4), upsample=True)  # 64 pixels of the large image
    assert not is_ours(layer(), image(height=7, width=9))  # 63
    assert not is_ours(layer(), image(height=3, width=5), upsample=True)
    assert not is_ours(layer(15), image(channels=15))
    assert not is_ours(layer(outputs=31), image())
    assert not is_ours(layer(), image(channels=17))  # which torch's own error says


@pytest.mark.parametrize(
    ("options", "because"),
    [
        ({"size": 5, "padding": 2}, "kernel size"),
        ({"size": 1, "padding": 0}, "kernel size"),
        ({"stride": 2}, "stride"),
        ({"padding": 0}, "padding"),
        ({"padding": "same"}, "a word, whatever it means"),
        ({"padding": 2, "dilation": 2}, "dilation"),
        ({"groups": 2}, "groups"),
        ({"padding_mode": "circular"}, "padding mode"),
        ({"dtype": torch.float64}, "dtype"),
        ({"dtype": torch.bfloat16}, "dtype"),
        ({"device": "meta"}, "device"),
    ],
)
def test_other_convolutions_are_torchs(options: dict[str, Any], because: str) -> None:
    conv = layer(**options)
    x = image().to(conv.weight.device, conv.weight.dtype)
    assert not is_ours(conv, x), because
    with torch.no_grad():
        made, wanted = convolve(conv, x), conv(x)
        assert made.shape == wanted.shape
        assert made.is_meta or torch.equal(made, wanted)


class Lora(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def hooked() -> nn.Conv2d:
    conv = layer()
    conv.register_forward_hook(lambda module, given, out: 2.0 * out)
    return conv


def hooked_before() -> nn.Conv2d:
    conv = layer()
    conv.register_forward_pre_hook(lambda module, given: (2.0 * given[0],))
    return conv


def with_a_forward_of_its_own() -> nn.Conv2d:
    conv = layer()
    conv.forward = lambda x: 2.0 * nn.Conv2d.forward(conv, x)  # type: ignore[method-assign, assignment]
    return conv


def subclass() -> nn.Conv2d:
    torch.manual_seed(0)
    return Lora(16, 32, 3, padding=1)


def pruned() -> nn.Conv2d:
    conv = layer()
    prune.l1_unstructured(conv, "weight", 0.5)
    return conv


def normed() -> nn.Conv2d:
    return nn.utils.parametrizations.weight_norm(layer())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "made", [hooked, hooked_before, with_a_forward_of_its_own, subclass, pruned, normed], ids=lambda f: str(f.__name__)
)
def test_layers_that_are_more_are_called(made: Callable[[], nn.Conv2d]) -> None:
    conv, x = made(), image()
    assert not is_ours(conv, x)
    with torch.no_grad():
        assert torch.equal(convolve(conv, x), conv(x))
        assert not torch.equal(convolve(conv, x), layer()(x))
        large = F.interpolate(x, scale_factor=2.0)
        assert torch.equal(convolve(conv, x, upsample=True), conv(large))


@pytest.mark.full
def test_compiled_layers_are_called() -> None:
    conv = layer()
    conv.compile(backend="eager")
    assert not is_ours(conv, image())


def test_hooks_of_all_modules_and_other_modules_are_called() -> None:
    assert not is_ours(nn.Sequential(layer()), image())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not is_ours(layer(), image())
    finally:
        handle.remove()
    assert is_ours(layer(), image())


class Marked(Tensor):
    """A tensor that sees what is called with it."""


def test_other_kinds_of_tensors_see_torchs_convolution() -> None:
    conv, x = layer(), image()
    assert not is_ours(conv, x.as_subclass(Marked))
    assert type(convolve(conv, x.as_subclass(Marked))) is Marked
    assert not is_ours(conv, x[0])  # [C, H, W], which torch's takes
    assert convolve(conv, x[0]).shape == (32, 8, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
        assert convolve(conv, fake).shape == (2, 32, 8, 8)
    assert not is_ours(conv, fake), "also outside of its mode"


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.autocast("cpu", torch.bfloat16), forward_ad.dual_level, lambda: FlopCounterMode(display=False)],
    ids=["autocast", "forward-mode", "dispatch"],
)
def test_modes_see_torchs_convolution(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    conv, x = layer(), image()
    with torch.no_grad(), mode() as entered:
        assert not is_ours(conv, x)
        made = convolve(conv, x)
        assert torch.equal(made, conv(x))
    if isinstance(entered, FlopCounterMode):  # twice: 2 B K C 9 H W
        assert entered.get_total_flops() == 2 * 2 * 2 * 32 * 16 * 9 * 64
    assert is_ours(conv, x)


def test_tangents_pass_through() -> None:
    conv, x = layer(), image()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(convolve(conv, forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, F.conv2d(torch.ones_like(x), conv.weight, padding=1))


def test_transforms_see_torchs_convolution() -> None:
    conv, x = layer(), image()
    seen: list[bool] = []

    def called(x: Tensor) -> Tensor:
        seen.append(is_ours(conv, x))
        return convolve(conv, x)

    torch.testing.assert_close(functorch.vmap(called)(x[:, None])[:, 0], conv(x))
    wanted = torch.autograd.grad(conv(given := x.clone().requires_grad_()).sum(), given)[0]
    torch.testing.assert_close(functorch.grad(lambda x: called(x).sum())(x), wanted)
    assert seen == [False, False]


class Doubled(nn.Module):
    """[B, 16, H, W] to [B, 32, 2 H, 2 W] by `convolve`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layer()

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv, x, upsample=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning", "error::torch.jit.TracerWarning")
def test_a_trace_holds_torchs_convolution() -> None:
    traced = torch.jit.trace(Doubled(), image(), check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
    assert "diffkern" not in str(traced.inlined_graph)


def test_an_export_holds_torchs_convolution() -> None:
    nodes = [str(node.target) for node in torch.export.export(Doubled(), (image(),)).graph.nodes]
    assert any("conv2d" in name or "convolution" in name for name in nodes)
    assert not [name for name in nodes if "diffkern" in name]


@pytest.mark.full
def test_a_compiled_network_holds_torchs_convolution() -> None:
    targets: list[str] = []

    def backend(module: Any, given: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    network = Doubled()
    torch.testing.assert_close(torch.compile(network, backend=backend, fullgraph=True)(image()), network(image()))
    assert any("conv2d" in name for name in targets)
    assert not [name for name in targets if "diffkern" in name]


# ------------------------------------------------------------------------------------------------------ the numbers
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_result_is_the_convolution(upsample: bool, bias: bool) -> None:
    conv, x = layer(17, 33, bias=bias), image(2, 17, 9, 11)
    assert is_ours(conv, x, upsample)
    exact = copy.deepcopy(conv).double()
    seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    wanted = exact(seen.double())
    made = convolve(conv, x, upsample=upsample)
    assert (made - wanted).abs().max() <= (conv(seen) - wanted).abs().max() + 2.0**-23 * wanted.abs().max()


@pytest.mark.parametrize("upsample", [False, True])
def test_gradients_are_the_convolutions(upsample: bool) -> None:
    conv, x = layer(), image().requires_grad_()
    seen = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
    given = torch.randn_like(conv(seen))
    wanted = torch.autograd.grad(conv(seen), [x, *conv.parameters()], given)
    with freeze(conv):
        found = torch.autograd.grad(convolve(conv, x, upsample=upsample), [x, *conv.parameters()], given)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("upsample", [False, True])
@torch.no_grad()
def test_a_sample_has_its_bits_in_every_batch_packed_or_not(upsample: bool) -> None:
    conv, x = layer(), image(5)
    wanted = convolve(conv, x, upsample=upsample)
    with Packed(2**20).used():
        packed = [convolve(conv, x, upsample=upsample), convolve(conv, x[1:3], upsample=upsample)]
    alone = torch.cat([convolve(conv, one[None], upsample=upsample) for one in x])
    assert torch.equal(alone, wanted)
    assert torch.equal(packed[0], wanted)
    assert torch.equal(packed[1], wanted[1:3])
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(convolve(conv, last, upsample=upsample), wanted)


def test_an_empty_batch() -> None:
    assert convolve(layer(), image(0)).shape == (0, 32, 8, 8)
    assert convolve(layer(), image(0), upsample=True).shape == (0, 32, 16, 16)


@pytest.mark.full
def test_without_vectors_all_is_torchs() -> None:
    program = (
        "import torch\nfrom torch import nn\nfrom diffkern.nn.convolution import convolve, is_ours\n"
        "conv, x = nn.Conv2d(16, 32, 3, padding=1), torch.randn(1, 16, 8, 8)\n"
        "assert not is_ours(conv, x) and not is_ours(conv, x, True)\n"
        "assert torch.equal(convolve(conv, x), conv(x))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "DIFFKERN_ISA": "scalar"})


# --------------------------------------------------------------------------------- what somebody has put in their place
def test_replaced_arithmetic_of_a_layer_or_of_the_class_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seamless images are made: circular borders by a `_conv_forward` of the object, or of all convolutions."""

    def circular(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    x, conv = image(), layer()
    wanted = circular(conv, x, conv.weight, conv.bias)
    assert is_ours(conv, x)
    conv._conv_forward = circular.__get__(conv)  # type: ignore[method-assign]
    assert not is_ours(conv, x)
    assert torch.equal(convolve(conv, x), wanted)
    del conv._conv_forward
    assert is_ours(conv, x)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", circular)
    assert not is_ours(conv, x)
    assert torch.equal(convolve(conv, x), wanted)


def test_weights_and_biases_of_other_shapes_and_strides() -> None:
    x, conv = image(), layer()
    conv.bias = nn.Parameter(torch.ones(1).expand(32))
    torch.testing.assert_close(convolve(conv, x), conv(x))
    conv.bias = nn.Parameter(torch.ones(64)[::2].double())
    assert not is_ours(conv, x)
    five = layer()
    five.weight = nn.Parameter(torch.randn(32, 16, 5, 5))  # of a layer that still says 3 x 3
    assert not is_ours(five, x)
    assert convolve(five, x).shape == (2, 32, 6, 6)


def test_a_graph_before_dispatch_holds_torchs_convolution() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    conv = layer().requires_grad_(False)
    graph = make_fx(lambda x: convolve(conv, x), pre_dispatch=True)(image())
    assert "diffkern" not in graph.code
