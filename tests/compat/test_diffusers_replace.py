"""Networks of diffusers after `replace`, against themselves before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from helpers.op_counter import CountOps, EveryOp
from helpers.replaced_networks import NETWORKS, network
from helpers.tolerances import check
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = needs("diffusers")
ours, resnet = Lazy("diffkern.compat.diffusers"), Lazy("diffusers.models.resnet")
upsampling = Lazy("diffusers.models.upsampling")
transformer = Lazy("diffkern.compat.diffusers._blocks_transformer")
LAST = torch.channels_last


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.GroupNorm) for module in model.modules())


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_computes_what_it_did(name: str) -> None:
    model, call = network(name)
    before = call(model, torch.float32)
    report = ours.replace(model)
    assert not report.kept, str(report)
    with CountOps(()) as count:
        after = call(model, torch.float32)
    assert count.fused["group_norm_act"] == norms(model)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    assert after.is_contiguous()


@pytest.mark.parametrize("name", ["ddpm", "adm", "sdxl", "dit"])
@torch.no_grad()
def test_bfloat16_is_at_least_as_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkern.compat.kit.kernels.TORCH_HAS_AMX", False)
    model, call = network(name)
    model.bfloat16()
    exact = call(copy.deepcopy(model).double(), torch.float64)
    plain = call(model, torch.bfloat16)
    ours.replace(model)
    after = call(model, torch.bfloat16)
    assert after.dtype == torch.bfloat16
    check(after, exact, plain, name)


@pytest.mark.parametrize("name", ["ddpm", "adm", "sd1", "dit"])
def test_gradients_are_the_original_ones(name: str) -> None:
    model, call = network(name)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it draws in the order of memory: not the same elements in channels_last

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)  # DiT drops labels
        return list(torch.autograd.grad(call(model, torch.float32).square().mean(), list(model.parameters())))

    before = gradients()
    ours.replace(model)
    after = gradients()
    size = max(g.abs().max() for g in before)
    assert max((a - b).abs().max() for a, b in zip(after, before, strict=True)) < 2e-5 * size


@torch.no_grad()
def test_nothing_is_copied_between_formats() -> None:
    """In channels_last an image is its tokens: the formats of what enters and leaves are changed, and no image else."""
    model, call = network("sd1")
    ours.replace(model)
    call(model, torch.float32)
    with EveryOp() as ops:
        call(model, torch.float32)
    assert ops.counts["aten.clone"] <= 2
    assert ops.counts["aten.native_group_norm"] == 0


RESNETS: dict[str, dict[str, Any]] = {
    "default": {},
    "widening": {"out_channels": 16, "conv_shortcut_bias": False},
    "scale_shift": {"time_embedding_norm": "scale_shift", "groups_out": 2},
    "no time": {"temb_channels": None},
    "up": {"up": True, "output_scale_factor": 2.0},
    "down": {"down": True, "skip_time_act": True},
    "fir up": {"up": True, "kernel": "fir"},
    "sde_vp down": {"down": True, "kernel": "sde_vp", "non_linearity": "mish"},
}


@pytest.mark.parametrize("options", RESNETS)
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
@torch.no_grad()
def test_residual_blocks_with_every_option(options: str, last: bool) -> None:
    torch.manual_seed(2)
    arguments = {"in_channels": 8, "temb_channels": 12, "groups": 4, **RESNETS[options]}
    block = resnet.ResnetBlock2D(**arguments).eval()
    x, temb = torch.randn(3, 8, 6, 6), torch.randn(3, 12)
    x = x.contiguous(memory_format=LAST) if last else x
    time = None if arguments["temb_channels"] is None else temb
    before, kept = block(x, time), x.clone()
    assert len(ours.replace(nn.ModuleList([block])).swapped) >= 1
    assert type(block).__module__.startswith("diffkern")
    torch.testing.assert_close(block(x, time), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, kept), "the input is the caller's"
    if time is not None:  # an embedding that all samples share
        original = ours.restore(nn.ModuleList([block])) and block(x, temb[:1])
        ours.replace(nn.ModuleList([block]))
        torch.testing.assert_close(block(x, temb[:1]), original, rtol=1e-5, atol=1e-5)


def test_a_missing_embedding_is_diffusers_error() -> None:
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, time_embedding_norm="scale_shift")
    for _ in range(2):
        with pytest.raises(ValueError, match="`temb` should not be None when `time_embedding_norm` is scale_shift"):
            block(torch.randn(1, 8, 4, 4), None)
        ours.replace(nn.ModuleList([block]))


@torch.no_grad()
def test_upsampling_does_not_make_the_large_image_where_it_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    layer = upsampling.Upsample2D(32, use_conv=True).eval()
    large, small = torch.randn(1, 32, 4, 4), torch.randn(1, 32, 2, 3)
    before = [layer(large), layer(small), layer(small, (7, 9))]
    ours.replace(nn.ModuleList([layer]))
    with monkeypatch.context() as patched:
        patched.setattr(F, "interpolate", None)
        after = [layer(large)]
    after += [layer(small), layer(small, (7, 9))]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert layer(torch.randn(64, 32, 2, 2).contiguous(memory_format=LAST)).is_contiguous(memory_format=LAST)
    with pytest.raises(AssertionError):  # diffusers' own check of the channels
        layer(torch.randn(1, 16, 4, 4))


def test_the_gated_gelu_and_both_its_derivatives() -> None:
    torch.manual_seed(5)
    x, gate = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(transformer.geglu(x, gate), x * F.gelu(gate))
    assert torch.autograd.gradcheck(transformer.geglu, (x, gate))
    assert torch.autograd.gradgradcheck(transformer.geglu, (x, gate))


def test_training_keeps_less() -> None:
    """What a residual block keeps for its gradient: its input and that of each convolution, not each norm's result."""

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(x, temb).sum()
        return sum(sizes.values())

    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=8, groups=4)
    x, temb = torch.randn(8, 8, 16, 16).contiguous(memory_format=LAST), torch.randn(8, 8)
    before = kept()
    ours.replace(nn.ModuleList([block]))
    assert kept() < 0.7 * before
