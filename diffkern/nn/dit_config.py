"""What a `DiT` is made from: plain data, which a checkpoint stores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diffkern import records
from diffkern.names import Attention
from diffkern.nn.heads import check_attention, count_heads

LARGEST = 1 << 20
"""Of every size in a `DiTConfig`."""
_SIZES = ("patch", "in_channels", "width", "depth", "heads", "time_channels")


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Everything that decides the shape of a `DiT`, as plain data.

    image_size         height and width of the images, or (height, width); divisible by ``patch``
    patch              a token is a square of this many pixels
    in_channels        channels of x_t, and of the prediction
    learned_variance   twice the channels come out: the prediction, and what is said of the variance
    width              channels of a token; divisible by 4 (sines and cosines of two coordinates)
    depth              transformer blocks
    heads              attention heads; each gets a multiple of 8 channels, up to 256, or 512
    mlp_ratio          channels between the two linear layers of a block, as a multiple of ``width``
    qkv_bias           whether the linear layer before attention has a bias
    classes            number of classes, 0 for a network without condition; class index ``classes`` is "no condition"
    time_channels      sinusoids of the time
    embedding          width of the embedding of time and class; ``width`` unless given
    own_embeddings     every block has its own embedding of time and class, as diffusers' class has, instead of one
    eps                of the layer norms
    mlp_eps            of the one before the two linear layers of a block; ``eps`` unless given
    dropout            dropout after attention and between the two linear layers
    time_scale         the time is multiplied by this before the sinusoids (1000 for times in [0, 1])
    time_freq_shift    the slowest sinusoid is 10000^-1 for 1, the next of that series for 0
    attention          "diffkern", or "torch": the same formula in `F.scaled_dot_product_attention`, as ONNX needs it

    ValueError for values that make no network. `presets` has the published ones.
    """

    image_size: int | tuple[int, int] = 32
    patch: int = 2
    in_channels: int = 4
    learned_variance: bool = False
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    classes: int = 1000
    time_channels: int = 256
    embedding: int | None = None
    own_embeddings: bool = False
    eps: float = 1e-6
    mlp_eps: float | None = None
    dropout: float = 0.0
    time_scale: float = 1.0
    time_freq_shift: float = 0.0
    attention: Attention = "diffkern"

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(size) != 2:
            raise ValueError(f"DiTConfig.image_size must be one size or (height, width), got {records.shown(size)}")
        sizes: list[tuple[str, int]] = [("image_size", n) for n in size]
        sizes += [(name, getattr(self, name)) for name in _SIZES]
        sizes += [("embedding", self.embedding)] if self.embedding is not None else []
        for name, value in sizes:
            if value < 1:
                raise ValueError(f"DiTConfig.{name} must be at least 1, got {value}")
        for name, value in [*sizes, ("classes", self.classes)]:
            if value > LARGEST:
                raise ValueError(f"DiTConfig.{name} must be at most {LARGEST}, got {records.shown(value)}")
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(
                f"DiTConfig.image_size must be divisible by {self.patch}, the size of a patch, got {self.image_size}"
            )
        if self.width % 4:
            raise ValueError(f"DiTConfig.width must be divisible by 4, got {self.width}")
        if self.time_channels % 2 or self.time_channels < 4:
            raise ValueError(f"DiTConfig.time_channels must be even, and at least 4, got {self.time_channels}")
        try:
            count_heads(self.width, self.heads)
        except ValueError as error:
            raise ValueError(f"DiTConfig.heads does not fit: {error}") from None
        if not math.isfinite(self.mlp_ratio) or not 1 <= self.width * self.mlp_ratio <= LARGEST:
            raise ValueError(
                f"DiTConfig.mlp_ratio must give between 1 and {LARGEST} channels for {self.width}, got {self.mlp_ratio}"
            )
        if self.classes < 0:
            raise ValueError(f"DiTConfig.classes must not be negative, got {self.classes}")
        for name, number in (("eps", self.eps), ("mlp_eps", self.mlp_eps)):
            if number is not None and not 0.0 < number < math.inf:
                raise ValueError(f"DiTConfig.{name} must be positive, got {number}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"DiTConfig.dropout must lie in [0, 1), got {self.dropout}")
        if not math.isfinite(self.time_scale):
            raise ValueError(f"DiTConfig.time_scale must be finite, got {self.time_scale}")
        if not -math.inf < self.time_freq_shift < self.time_channels // 2:
            raise ValueError(
                f"DiTConfig.time_freq_shift must be below {self.time_channels // 2}, half of time_channels, got "
                f"{self.time_freq_shift}"
            )
        check_attention("DiTConfig.attention", self.attention)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def out_channels(self) -> int:
        """Channels that come out: those of x, twice where the variance is learned."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def mlp_width(self) -> int:
        """Channels between the two linear layers of a block."""
        return int(self.width * self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DiTConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(DiTConfig, values, "DiTConfig.")
