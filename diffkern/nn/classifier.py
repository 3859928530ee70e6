"""The encoder half of a UNet with pooling: a classifier of noisy images, for classifier guidance."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import records
from diffkern.checks import unknown
from diffkern.nn.attention import AttentionPool
from diffkern.nn.conditions import Known, as_mapping
from diffkern.nn.embedded import lay_out, switch_attention
from diffkern.nn.encoder import Encoder
from diffkern.nn.norm import GroupNormAct, count_groups
from diffkern.nn.unet_config import UNetConfig

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]


@dataclasses.dataclass(frozen=True)
class UNetClassifierConfig:
    """A `UNetClassifier`: the UNet whose way down and middle it has, and what follows.

    encoder    the UNet; its `image_size` decides the positions of the pooling by attention
    labels     number of classes
    pool       "adaptive": GroupNorm, SiLU, the mean over positions, 1 x 1; "attention": GroupNorm, SiLU, attention from
               the mean to all positions (Radford et al. 2021); "spatial": the means over positions of every block's
               output, Linear to 2048, ReLU, Linear; "spatial_v2": the same with GroupNorm and SiLU for ReLU
    """

    encoder: UNetConfig
    labels: int = 1000
    pool: Pool = "attention"

    def __post_init__(self) -> None:
        if self.labels < 1:
            raise ValueError(f"UNetClassifierConfig.labels must be at least 1, got {self.labels}")
        if self.pool not in get_args(Pool):
            raise ValueError(unknown("UNetClassifierConfig.pool", self.pool, get_args(Pool)))
        if self.pool == "attention" and self.encoder.size is None:
            raise ValueError("UNetClassifierConfig.encoder must have an image_size where pool is 'attention', got None")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> UNetClassifierConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(UNetClassifierConfig, values, "UNetClassifierConfig.")


def _pyramid(channels: int, config: UNetClassifierConfig) -> nn.Sequential:
    """Two layers over the means of every block."""
    wide = 2048
    between: list[nn.Module] = [nn.ReLU()]
    if config.pool == "spatial_v2":
        between = [nn.GroupNorm(count_groups(wide, config.encoder.groups), wide, config.encoder.eps), nn.SiLU()]
    return nn.Sequential(nn.Linear(channels, wide), *between, nn.Linear(wide, config.labels))


class UNetClassifier(Encoder):
    """log p(y | x_t) before the softmax: ``model(x, t)`` with x [B, C, H, W], t [B] to logits [B, labels].

    The classifier of Dhariwal and Nichol 2021 (lecture 002, classifier guidance): the way down and the middle of a
    `UNet`, then pooling. ValueError as for `UNet`.
    """

    def __init__(self, config: UNetClassifierConfig) -> None:
        super().__init__(config.encoder)
        self.classifier_config = config
        encoder = config.encoder
        channels = encoder.widths[-1]
        groups = count_groups(channels, encoder.groups, encoder.group_channels)
        self.norm = None if config.pool.startswith("spatial") else GroupNormAct(groups, channels, encoder.eps)
        if self.norm is None:
            self.pool: nn.Module = _pyramid(sum(self.skip_channels) + channels, config)
        elif config.pool == "attention":
            assert encoder.size is not None
            height, width = encoder.size
            places = (height // encoder.divisor) * (width // encoder.divisor)
            heads = self._heads(channels)
            self.pool = AttentionPool(places, channels, heads, config.labels)
        else:
            self.pool = nn.Conv2d(channels, config.labels, 1)
        switch_attention(self, encoder.attention)
        lay_out(self)

    def _heads(self, channels: int) -> int:
        head_channels = self.config.head_channels
        return self.config.heads if head_channels is None else channels // head_channels

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self._checked(x)
        known: Known = self.known(t, cond, x.shape[0])
        h, outputs = self.encode(x, as_mapping(cond), iter(known.changes), iter(known.contexts))
        if self.norm is None:
            found: Tensor = self.pool(torch.cat([output.mean((2, 3)) for output in (*outputs, h)], dim=1))
            return found
        h = self.norm(h)
        if isinstance(self.pool, AttentionPool):
            return self.pool(h)
        out: Tensor = self.pool(F.adaptive_avg_pool2d(h, 1)).flatten(1)
        return out
