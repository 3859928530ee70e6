"""Attention layers of diffusers' models with DiffkernAttnProcessor, against diffusers' own processors in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from helpers.op_counter import CountOps
from helpers.tolerances import check
from torch import Tensor, nn

pytestmark = needs("diffusers")
diffusers, processors = Lazy("diffusers"), Lazy("diffusers.models.attention_processor")
ours = Lazy("diffkern.compat.diffusers.attention")

Call = Callable[[nn.Module, torch.dtype], Tensor]


def unet() -> tuple[nn.Module, Call]:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    x = torch.randn(2, 3, 16, 16)
    return model, lambda m, dtype: m(x.to(dtype), 7).sample


def conditional_unet() -> tuple[nn.Module, Call]:
    torch.manual_seed(1)
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=24,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24)
    return model, lambda m, dtype: m(x.to(dtype), 7, encoder_hidden_states=text.to(dtype)).sample


def vae() -> tuple[nn.Module, Call]:
    """One head of 512 channels in the middle, as all Stable Diffusion VAEs have."""
    torch.manual_seed(2)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 512),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
    )
    x = torch.randn(1, 3, 16, 16)
    return model, lambda m, dtype: m(x.to(dtype)).sample


MODELS = {"UNet2DModel": unet, "UNet2DConditionModel": conditional_unet, "AutoencoderKL": vae}
PROCESSORS: dict[str, Callable[[], Any]] = {
    "AttnProcessor": lambda: processors.AttnProcessor(),
    "AttnProcessor2_0": lambda: processors.AttnProcessor2_0(),
    "SlicedAttnProcessor": lambda: processors.SlicedAttnProcessor(2),
}


def fill(model: nn.Module) -> nn.Module:
    """Weights of usual size everywhere: a layer that starts at zero would hide its input."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval()


def swap(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, processors.Attention):
            layer.set_processor(ours.DiffkernAttnProcessor(layer.processor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_model_is_at_least_as_exact(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffkern.compat.kit.kernels.TORCH_HAS_AMX", False)  # else some calls run on torch's attention
    model, call = MODELS[name]()
    fill(model)
    exact = call(copy.deepcopy(model).double(), torch.float64)
    model.to(dtype)
    plain = call(model, dtype)
    swap(model)
    layers = sum(isinstance(layer, processors.Attention) for layer in model.modules())
    with CountOps(()) as count:
        ours = call(model, dtype)
    assert count.fused["attention"] == layers > 0
    assert not torch.equal(ours, plain), "the processor is not in use"
    check(ours, exact, plain, name)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("scale_qk", [True, False])
@torch.no_grad()
def test_a_layer_computes_what_its_processor_did(processor: str, scale_qk: bool) -> None:
    """Every option of the layer; scale_qk=False is heeded by the processors that heed it, and by them alone."""
    torch.manual_seed(3)
    layer = processors.Attention(
        query_dim=32,
        cross_attention_dim=20,
        heads=4,
        dim_head=16,
        bias=True,
        norm_num_groups=4,
        cross_attention_norm="layer_norm",
        residual_connection=True,
        rescale_output_factor=1.7,
        scale_qk=scale_qk,
        upcast_attention=True,
        upcast_softmax=True,
        qk_norm=None if processor == "AttnProcessor" else "layer_norm",
    ).eval()
    x, context = torch.randn(2, 9, 32), torch.randn(2, 5, 20)
    layer.set_processor(PROCESSORS[processor]())
    assert ours.why_not(layer, layer.processor) is None
    plain, plain_image = layer(x, context), layer(torch.ones(2, 32, 3, 5), context)
    exact, exact_image = (layer.double()(t.double(), context.double()) for t in (x, torch.ones(2, 32, 3, 5)))
    layer.float().set_processor(ours.DiffkernAttnProcessor(layer.processor))
    check(layer(x, context), exact, plain)
    check(layer(torch.ones(2, 32, 3, 5), context), exact_image, plain_image)
    assert not layer.processor.fallbacks


@torch.no_grad()
def test_spatial_norm() -> None:
    torch.manual_seed(4)
    layer = processors.Attention(32, heads=2, dim_head=16, spatial_norm_dim=6, residual_connection=True).eval()
    x, zq = torch.randn(2, 32, 4, 4), torch.randn(2, 6, 2, 2)
    plain = layer(x, temb=zq)
    exact = layer.double()(x.double(), temb=zq.double())
    layer.float().set_processor(ours.DiffkernAttnProcessor(layer.processor))
    check(layer(x, temb=zq), exact, plain)
    assert "spatial norm" in str(ours.why_not(layer, processors.SlicedAttnProcessor(1)))


@pytest.mark.parametrize("cross", [False, True])
@torch.no_grad()
def test_fused_projections(cross: bool) -> None:
    torch.manual_seed(5)
    layer = processors.Attention(32, cross_attention_dim=20 if cross else None, heads=2, dim_head=16).eval()
    layer.fuse_projections()
    layer.set_processor(processors.FusedAttnProcessor2_0())
    x, context = torch.randn(2, 9, 32), torch.randn(2, 5, 20) if cross else None
    plain = layer(x, context)
    exact = layer.double()(x.double(), None if context is None else context.double())
    layer.float().set_processor(ours.DiffkernAttnProcessor(layer.processor))
    check(layer(x, context), exact, plain)


@torch.no_grad()
def test_a_sample_has_the_same_bits_in_every_batch() -> None:
    """Of the attention itself: torch's own matrix products promise no such thing."""
    torch.manual_seed(6)
    layer = processors.Attention(64, heads=4, dim_head=16).eval()
    for name in ("to_q", "to_k", "to_v"):
        setattr(layer, name, nn.Identity())
    layer.to_out[0] = nn.Identity()
    layer.set_processor(ours.DiffkernAttnProcessor())
    x = torch.randn(5, 33, 64)
    assert torch.equal(layer(x)[2:3], layer(x[2:3]))


def test_gradients() -> None:
    torch.manual_seed(7)
    layer = processors.Attention(32, heads=2, dim_head=16)
    x = torch.randn(2, 9, 32, requires_grad=True)

    def gradient(layer: nn.Module, x: Tensor) -> Tensor:
        found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        return torch.cat([g.flatten() for g in found])

    plain = gradient(layer, x)
    exact = gradient(copy.deepcopy(layer).double(), x.double())
    layer.set_processor(ours.DiffkernAttnProcessor(layer.processor))
    check(gradient(layer, x), exact, plain)


@pytest.mark.parametrize("processor", PROCESSORS)
@torch.no_grad()
def test_a_mask_runs_on_the_original(processor: str) -> None:
    torch.manual_seed(8)
    layer = processors.Attention(32, heads=2, dim_head=16, processor=PROCESSORS[processor]()).eval()
    x, mask = torch.randn(2, 9, 32), torch.zeros(2, 1, 9)
    mask[:, :, 4:] = -1e4
    theirs = layer(x, attention_mask=mask)
    layer.set_processor(ours.DiffkernAttnProcessor(layer.processor))
    assert torch.equal(layer(x, attention_mask=mask, temb=torch.zeros(1)), theirs)
    assert layer.processor.fallbacks == {"an attention mask was given": 1}
    layer(x)
    assert sum(layer.processor.fallbacks.values()) == 1


@torch.no_grad()
def test_a_device_without_kernels_runs_on_the_original() -> None:
    layer = processors.Attention(32, heads=2, dim_head=16, processor=ours.DiffkernAttnProcessor()).eval().to("meta")
    layer(torch.empty(2, 9, 32, device="meta"))
    assert layer.processor.fallbacks == {"no kernels for the device meta": 1}


def test_what_cannot_be_swapped_says_why() -> None:
    class Mine(processors.AttnProcessor2_0):
        pass

    assert ours.why_not(processors.Attention(32, heads=2, dim_head=16), Mine()) == (
        "Mine computes something else than softmax(Q K^T) V of the layer's projections"
    )
    assert "AttnAddedKVProcessor2_0" in str(
        ours.why_not(processors.Attention(32, heads=2), processors.AttnAddedKVProcessor2_0())
    )
    for dim in (4, 20, 264, 1024):
        assert f"got {dim}" in str(
            ours.why_not(processors.Attention(2 * dim, heads=2, dim_head=dim), processors.AttnProcessor())
        )
    for dim in (8, 40, 256, 512):
        assert ours.why_not(processors.Attention(2 * dim, heads=2, dim_head=dim), processors.AttnProcessor()) is None
    few = processors.Attention(32, heads=4, kv_heads=2, dim_head=8)
    assert "fewer heads" in str(ours.why_not(few, few.processor))
    assert "Linear is not" in str(ours.why_not(nn.Linear(1, 1), processors.AttnProcessor2_0()))


def test_an_unfit_head_is_an_error_of_the_op() -> None:
    layer = processors.Attention(40, heads=2, dim_head=20, processor=ours.DiffkernAttnProcessor())
    with pytest.raises(RuntimeError, match="multiple of 8 up to 256, or 512, got 20"):
        layer(torch.randn(1, 4, 40))


@torch.no_grad()
@pytest.mark.full
def test_compiles_without_a_break() -> None:
    torch.manual_seed(9)
    layer = processors.Attention(32, heads=2, dim_head=16, processor=ours.DiffkernAttnProcessor()).eval()
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
