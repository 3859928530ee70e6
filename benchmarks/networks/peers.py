"""The networks: diffusers' classes with the configurations of the papers' models, random weights, and their inputs.

Nothing is downloaded: a configuration and a seed say everything. Norms and biases are moved away from 1 and 0, so that
a map that forgets one of them gives another output.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["NETWORKS", "Inputs", "Network", "parameters", "theirs"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Inputs:
    """What an evaluation is given; ``cond`` has at most one of "class" (int64 [B]) and "context" ([B, T, E])."""

    x: Tensor
    t: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> Inputs:
        """In another dtype (times and classes stay) and memory format of x."""
        cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.cond.items()}
        return replace(self, x=self.x.to(dtype).contiguous(memory_format=layout), cond=cond)


@dataclass(frozen=True)
class Network:
    """A network of diffusers: ``kind`` is its class; x has ``channels`` and ``size``; the rest is its configuration."""

    name: str
    title: str
    kind: str
    channels: int
    size: int
    config: Mapping[str, Any]
    classes: int = 0
    tokens: int = 0
    width: int = 0
    """Of a context token."""
    guided: Mapping[str, Any] | None = None
    """The arguments of guided-diffusion's `UNetModel`, where it has this network."""

    def build(self) -> nn.Module:
        """With the weights of seed 0, in evaluation mode. On the meta device inside ``torch.device("meta")``."""
        import diffusers
        from diffusers.models.normalization import AdaLayerNormZero

        diffusers.utils.logging.set_verbosity_error()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(diffusers, self.kind)(**self.config)
            for module in model.modules():
                if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
                    nn.init.normal_(module.weight, 1, 0.1)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    nn.init.normal_(parameter, 0, 0.1)
            first, *others = [m.emb for m in model.modules() if isinstance(m, AdaLayerNormZero)] or [None]
            for other in others:  # as in the published weights: theirs is one embedding, copied into every block
                other.load_state_dict(first.state_dict())
        return model.eval()

    def inputs(self, batch: int, device: str = "cpu") -> Inputs:
        """Standard normal x and context, times over 0..999, classes at random: the same in every call."""
        random = torch.Generator().manual_seed(1)
        shape = (batch, self.channels, self.size, self.size)
        cond = {}
        if self.classes:
            cond["class"] = torch.randint(0, self.classes, (batch,), generator=random)
        if self.tokens:
            cond["context"] = torch.randn(batch, self.tokens, self.width, generator=random)
        found = Inputs(torch.randn(shape, generator=random), torch.linspace(999, 20, batch).long(), cond)
        return replace(
            found, x=found.x.to(device), t=found.t.to(device), cond={k: v.to(device) for k, v in found.cond.items()}
        )


def theirs(model: nn.Module, given: Inputs) -> Tensor:
    """An evaluation by a diffusers network, called as pipelines do."""
    words = {"class": "class_labels", "context": "encoder_hidden_states"}
    cond = {words[name]: value for name, value in given.cond.items()}
    return model(given.x, timestep=given.t, return_dict=False, **cond)[0]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


_DDPM = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
"""google/ddpm-cifar10-32, Ho et al. 2020."""

_ADM = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "num_class_embeds": 1000,
    "down_block_types": ("ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 64,
    "attn_norm_num_groups": 32,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
}
"""ADM for ImageNet 64 (Dhariwal & Nichol 2021), as diffusers has it for consistency models; learned variance."""

_GUIDED = {
    "model_channels": 192,
    "out_channels": 6,
    "num_res_blocks": 3,
    "attention_resolutions": (2, 4, 8),
    "channel_mult": (1, 2, 3, 4),
    "num_classes": 1000,
    "num_head_channels": 64,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": True,
}

_SD = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
"""The network of Stable Diffusion 1.5."""

_DIT = {
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 12,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "dropout": 0.0,
}
"""DiT-S/2 (Peebles & Xie 2022)."""

NETWORKS = {
    network.name: network
    for network in (
        Network("ddpm", "DDPM, CIFAR-10", "UNet2DModel", 3, 32, _DDPM),
        Network("adm", "ADM, ImageNet 64, by class", "UNet2DModel", 3, 64, _ADM, classes=1000, guided=_GUIDED),
        Network("sd", "Stable Diffusion 1.5", "UNet2DConditionModel", 4, 64, _SD, tokens=77, width=768),
        Network("dit", "DiT-S/2, 256 tokens, by class", "DiTTransformer2DModel", 4, 32, _DIT, classes=1000),
    )
}
