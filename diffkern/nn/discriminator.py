"""Discriminators of GANs: one logit an image (DCGAN's), or one a patch (PatchGAN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from diffkern.nn.adversarial_config import DiscriminatorConfig
from diffkern.nn.conditions import check_state, check_unconditional, embed_classes
from diffkern.nn.generator import start_weights
from diffkern.nn.norm import count_groups


class Discriminator(nn.Module):
    """C(x), the logit that x is real: ``model(x, cond)`` with x [B, C, H, W] to [B], or [B, 1, h, w] of form "patch".

    "dcgan": 4 x 4 convolutions of stride 2 with leaky ReLU, and a linear layer over what is left (Radford et al. 2015,
    arXiv 1511.06434; lecture 000). "patch": the last of them and one more have stride 1, and each position of the map
    is the logit of a patch (Isola et al. 2016, arXiv 1611.07004), `DiscriminatorConfig.patch` pixels high and wide.
    ``cond``: classes int64 [B] in 0..classes - 1, or an image [B, cond_channels, H, W], as the configuration says, else
    None. Without batch norm each logit is made of its own image and condition alone.

    With `spectral_norm` a call in training mode takes one step of the power iteration of each weight, as torch does it:
    it looks at weights alone, but more calls, of more micro-batches say, are more steps. ValueError for images of
    another shape or dtype, a condition that is missing or not wanted, and classes outside.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        inputs = [config.given_channels, *widths[:-1]]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2 if level < config.halvings else 1, padding=1)
            for level, (before, after) in enumerate(zip(inputs, widths, strict=True))
        )
        self.norms = nn.ModuleList(_norm(config, width if level else None) for level, width in enumerate(widths))
        self.leave: nn.Module
        if config.form == "patch":
            self.leave = nn.Conv2d(widths[-1], 1, 4, padding=1)
        else:
            assert config.size is not None
            left = (config.size[0] // config.divisor) * (config.size[1] // config.divisor)
            self.leave = nn.Linear(widths[-1] * left, 1)
        self.embed = None
        if config.condition in ("projection", "embedding"):
            self.embed = nn.Embedding(
                config.classes, widths[-1] if config.condition == "projection" else config.embedding
            )
        start_weights(self)
        if config.spectral_norm:
            for layer in [*self.convs, self.leave, *([self.embed] if config.condition == "projection" else [])]:
                assert layer is not None
                spectral_norm(layer)

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        config = self.config
        weight = self.convs[0].bias
        assert isinstance(weight, Tensor)
        check_state(x, config.in_channels, config.divisor, weight)
        if config.form == "dcgan" and tuple(x.shape[2:]) != config.size:
            raise ValueError(f"x must have height and width {config.size}, got {tuple(x.shape)}")
        h = self._beside(x, cond, weight)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), config.slope)
        if config.form == "patch":
            return self._mapped(h, cond)
        logits: Tensor = self.leave(h.flatten(1))[:, 0]
        if config.condition == "projection":
            logits = logits + (self._vector(cond, x, weight) * h.sum((2, 3))).sum(1)
        return logits

    def _mapped(self, h: Tensor, cond: Any) -> Tensor:
        """A logit for each position; the inner product with the class's vector is that of the position's 4 x 4."""
        logits: Tensor = self.leave(h)
        if self.config.condition != "projection":
            return logits
        vector = self._vector(cond, h, h)
        along = (vector[:, :, None, None] * h).sum(1, keepdim=True)
        return logits + 16.0 * F.avg_pool2d(along, 4, stride=1, padding=1)

    def _beside(self, x: Tensor, cond: Any, weight: Tensor) -> Tensor:
        """The image, and what is concatenated with it."""
        config = self.config
        if config.condition == "none":
            check_unconditional(cond)
            return x
        if config.condition == "projection":
            return x
        if config.cond_channels:
            wanted = (x.shape[0], config.cond_channels, *x.shape[2:])
            if not isinstance(cond, Tensor) or tuple(cond.shape) != wanted or not cond.is_floating_point():
                got = f"{cond.dtype} {tuple(cond.shape)}" if isinstance(cond, Tensor) else type(cond).__name__
                raise ValueError(f"cond must be an image of shape {wanted}, got {got}")
            return torch.cat([x, cond.to(x.device, x.dtype)], dim=1)
        planes = self._vector(cond, x, weight)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return torch.cat([x, planes.to(x.dtype)], dim=1)

    def _vector(self, cond: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The class's vector: learned, or one-hot."""
        table = self._one_hot if self.embed is None else self.embed
        return embed_classes(table, self.config.classes - 1, cond, x.shape[0], weight.device, none=False)

    def _one_hot(self, classes: Tensor) -> Tensor:
        return F.one_hot(classes, self.config.classes).to(torch.float32)


def _norm(config: DiscriminatorConfig, channels: int | None) -> nn.Module:
    """Of a level's channels; none of the first level's, as in DCGAN and PatchGAN."""
    if channels is None or config.norm == "none":
        return nn.Identity()
    if config.norm == "batch":
        return nn.BatchNorm2d(channels, config.eps)
    # Torch's own: `ops.group_norm_act` is differentiable once, and a gradient penalty differentiates twice.
    return nn.GroupNorm(count_groups(channels, config.groups), channels, config.eps)
