"""Small networks of diffusers with random weights, every kind of block that `replace` knows, and a call of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers.lazy import Lazy

diffusers = Lazy("diffusers")

Call = Callable[[nn.Module, torch.dtype], Tensor]


def _unet(**options: Any) -> tuple[nn.Module, Call]:
    usual: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    model = diffusers.UNet2DModel(**usual | options)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    return model, lambda m, dtype: m(x.to(dtype), t).sample


def ddpm() -> tuple[nn.Module, Call]:
    """Asymmetric padding, a mid-block factor, dropout."""
    return _unet(downsample_padding=0, mid_block_scale_factor=1.4, dropout=0.1)


def adm() -> tuple[nn.Module, Call]:
    """Scale and shift of the embedding, residual blocks that resample."""
    return _unet(
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )


def ncsnpp() -> tuple[nn.Module, Call]:
    """FIR filters, sums over sqrt 2, a Fourier embedding."""
    return _unet(
        time_embedding_type="fourier",
        block_out_channels=(32, 32),
        norm_num_groups=None,
        norm_eps=1e-6,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )


def gelu() -> tuple[nn.Module, Call]:
    """Another nonlinearity than SiLU."""
    return _unet(act_fn="gelu")


def _conditional(**options: Any) -> tuple[nn.Module, Call]:
    usual: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    model = diffusers.UNet2DConditionModel(**usual | options)
    x, text, t = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.tensor([3, 500])

    def call(m: nn.Module, dtype: torch.dtype) -> Tensor:
        added = {"text_embeds": torch.ones(2, 16, dtype=dtype), "time_ids": torch.ones(2, 6)}
        return m(x.to(dtype), t, text.to(dtype), added_cond_kwargs=added).sample  # type: ignore[no-any-return]

    return model, call


def sd1() -> tuple[nn.Module, Call]:
    return _conditional()


def sdxl() -> tuple[nn.Module, Call]:
    """Linear projections (as SD 2.x), two blocks deep, added embeddings."""
    return _conditional(
        use_linear_projection=True,
        transformer_layers_per_block=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
        only_cross_attention=(True, False),
        mid_block_type="UNetMidBlock2DCrossAttn",
    )


def dit() -> tuple[nn.Module, Call]:
    model = diffusers.DiTTransformer2DModel(2, 8, 4, 8, num_layers=2, sample_size=8, num_embeds_ada_norm=10)
    x, t, classes = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.tensor([1, 9])
    return model, lambda m, dtype: m(x.to(dtype), t, classes).sample


def controlnet() -> tuple[nn.Module, Call]:
    unet, _ = sd1()
    model = diffusers.ControlNetModel.from_unet(unet, conditioning_channels=3)
    x, text, image = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 24), torch.randn(2, 3, 64, 64)

    def call(m: nn.Module, dtype: torch.dtype) -> Tensor:
        down, middle = m(x.to(dtype), 7, text.to(dtype), image.to(dtype), return_dict=False)
        return torch.cat([part.flatten() for part in (*down, middle)])

    return model, call


def vae() -> tuple[nn.Module, Call]:
    model = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    x = torch.randn(2, 3, 8, 8)
    return model, lambda m, dtype: m(x.to(dtype)).sample


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Call]]] = {
    f.__name__: f for f in (ddpm, adm, ncsnpp, gelu, sd1, sdxl, dit, controlnet, vae)
}


def network(name: str) -> tuple[nn.Module, Call]:
    """A network in eval mode and its call; weights of usual size everywhere, as zeros would hide what comes before."""
    torch.manual_seed(0)
    model, call = NETWORKS[name]()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.1)
    return model.eval(), call
