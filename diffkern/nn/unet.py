"""A small class-conditional UNet and the blocks it is made of.

The network of Ho et al. 2020, Nichol and Dhariwal 2021, and of lectures 000 and 002 (sections on the UNet):
residual blocks in pre-activation order (GroupNorm, SiLU, convolution), the sinusoidal embedding of the time brought
into every one of them, self-attention over the 2-D grid at the low resolutions, skip connections from the way down to
the way up. The blocks know nothing of the network around them, so that larger members of the family can be put
together from the same parts; `UNetConfig` says which network is meant, as plain data, and is what a checkpoint stores.

Nothing here depends on the noise schedule: the time is a number, an integer step or a real one, and the network
embeds it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import records
from diffkern.names import Attention
from diffkern.nn.attention import SpatialSelfAttention, check_attention, count_heads

Resample = Literal["none", "down", "up"]
Modulation = Literal["scale_shift", "add"]


LARGEST = 1 << 20
"""Of every size in a `UNetConfig`, and of the channels of a level."""
_SIZES = ("image_size", "in_channels", "out_channels", "channels", "blocks", "heads", "embedding")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Everything that decides the shape of a `UNet`, as plain data.

    image_size         height and width of the images; must be divisible by 2^(levels - 1)
    in_channels        channels of x_t
    out_channels       channels of the prediction
    channels           channels of the first level
    multipliers        channels of level l are ``channels * multipliers[l]``; each level halves the resolution
    blocks             residual blocks in each level on the way down (one more on the way up)
    attention_levels   levels with self-attention after each block; the middle of the network always has it
    heads              attention heads; each gets a multiple of 8 channels, up to 256, or 512
    embedding          width of the embedding of time and class
    classes            number of classes, 0 for a network without condition; class index ``classes`` is "no condition"
    modulation         "scale_shift": adaptive group norm, (1 + scale) GroupNorm(h) + shift; "add": GroupNorm(h + shift)
    dropout            dropout before the second convolution of a residual block
    time_scale         the time is multiplied by this before the sinusoids (1000 for times in [0, 1])
    attention          "diffkern", or "torch": the same formula in `F.scaled_dot_product_attention`, as ONNX needs it
    """

    image_size: int = 8
    in_channels: int = 1
    out_channels: int = 1
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    heads: int = 4
    embedding: int = 128
    classes: int = 10
    modulation: Modulation = "scale_shift"
    dropout: float = 0.0
    time_scale: float = 1.0
    attention: Attention = "diffkern"

    def __post_init__(self) -> None:
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"UNetConfig.{name} must be at least 1, got {getattr(self, name)}")
        for name in (*_SIZES, "classes"):
            value = getattr(self, name)
            if value > LARGEST:
                raise ValueError(f"UNetConfig.{name} must be at most {LARGEST}, got {records.shown(value)}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"UNetConfig.multipliers must be positive integers, one a level, got {self.multipliers}")
        if len(self.multipliers) > 16 or max(self.multipliers) > LARGEST // self.channels:
            raise ValueError(
                f"UNetConfig.multipliers must be at most 16, each at most {LARGEST // self.channels} for "
                f"{self.channels} channels, got {records.shown(self.multipliers)}"
            )
        factor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"UNetConfig.image_size must be divisible by {factor} for {len(self.multipliers)} levels, "
                f"got {self.image_size}"
            )
        if any(not 0 <= level < len(self.multipliers) for level in self.attention_levels):
            raise ValueError(
                f"UNetConfig.attention_levels must lie in [0, {len(self.multipliers)}), got {self.attention_levels}"
            )
        for level in {*self.attention_levels, len(self.multipliers) - 1}:
            try:
                count_heads(self.channels * self.multipliers[level], self.heads)
            except ValueError as error:
                raise ValueError(f"UNetConfig.heads does not fit level {level}: {error}") from None
        if self.modulation not in ("scale_shift", "add"):
            raise ValueError(f"UNetConfig.modulation must be 'scale_shift' or 'add', got {self.modulation!r}")
        if self.classes < 0:
            raise ValueError(f"UNetConfig.classes must not be negative, got {self.classes}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig.dropout must lie in [0, 1), got {self.dropout}")
        if self.embedding % 2:
            raise ValueError(f"UNetConfig.embedding must be even, got {self.embedding}")
        check_attention("UNetConfig.attention", self.attention)
        if not math.isfinite(self.time_scale):
            raise ValueError(f"UNetConfig.time_scale must be finite, got {self.time_scale}")

    @property
    def stages(self) -> int:
        """Residual blocks of the network, each with weights of its own."""
        levels = len(self.multipliers)
        return levels * (2 * self.blocks + 1) + 2 * (levels - 1) + 2

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> UNetConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(UNetConfig, values, "UNetConfig.")


def sinusoidal_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """[B] times (any dtype) to [B, width] float32: cos(t f_i) then sin(t f_i), f_i = max_period^(-i / (width / 2)).

    The time embedding of Vaswani et al. 2017 as used by Ho et al. 2020 (lectures 000 and 002).
    """
    if width % 2:
        raise ValueError(f"width must be even, got {width}")
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.to(torch.float32).reshape(-1, 1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def group_norm(channels: int, most_groups: int = 8) -> nn.GroupNorm:
    """GroupNorm with the largest number of groups, at most `most_groups`, that divides the channels."""
    return nn.GroupNorm(math.gcd(most_groups, channels), channels)


def _zeroed(module: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """The module with weights and bias 0: a residual branch that starts as the identity (Ho et al. 2020;
    lecture 002)."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def _resample(x: Tensor, kind: Resample) -> Tensor:
    """Half the resolution by averaging, twice the resolution by repetition, or x itself."""
    if kind == "down":
        return F.avg_pool2d(x, 2)
    if kind == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class ResBlock(nn.Module):
    """Pre-activation residual block: GroupNorm, SiLU, conv 3x3, embedding, GroupNorm, SiLU, dropout, conv 3x3, plus
    the skip.

    [B, C_in, H, W] and the embedding [B, E] to [B, C_out, H', W']. The embedding of time and class enters between the
    convolutions, either as adaptive group norm, (1 + scale) GroupNorm(h) + shift, or added to h. With resample "down"
    or "up" both branches change the resolution (the BigGAN block of Dhariwal and Nichol 2021; lecture 002).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        *,
        modulation: Modulation = "scale_shift",
        resample: Resample = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.resample: Resample = resample
        self.modulation: Modulation = modulation
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.modulate = nn.Linear(embedding, (2 if modulation == "scale_shift" else 1) * out_channels)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(_resample(F.silu(self.norm1(x)), self.resample))
        change = self.modulate(F.silu(embedding))[:, :, None, None]
        if self.modulation == "scale_shift":
            scale, shift = change.chunk(2, dim=1)
            h = torch.addcmul(shift, self.norm2(h), 1.0 + scale)
        else:
            h = self.norm2(h + change)
        h = self.conv2(self.dropout(F.silu(h)))
        out: Tensor = h + self.skip(_resample(x, self.resample))
        return out


class _Stage(nn.Module):
    """A residual block and the attention that may follow it."""

    def __init__(self, block: ResBlock, attention: SpatialSelfAttention | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """eps(x_t, t, class), or whichever prediction the network is trained for.

    ``model(x, t)`` or ``model(x, t, cond)``: x float [B, C, H, W], t [B] (or 0-dim) of any dtype, cond int64 [B] with
    values 0..classes; the value `null_class` = ``classes``, also meant when cond is None, is the network without
    condition, which classifier-free guidance needs. Returns [B, out_channels, H, W]. A wrong shape or class is a
    ValueError.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels * m for m in config.multipliers]
        embedding = config.embedding

        def block(in_channels: int, out_channels: int, resample: Resample = "none") -> ResBlock:
            return ResBlock(
                in_channels,
                out_channels,
                embedding,
                modulation=config.modulation,
                resample=resample,
                dropout=config.dropout,
            )

        def attention(channels: int) -> SpatialSelfAttention:
            groups = group_norm(channels).num_groups
            return SpatialSelfAttention(channels, config.heads, groups=groups, attention=config.attention)

        def stage(in_channels: int, out_channels: int, level: int) -> _Stage:
            attends = level in config.attention_levels
            return _Stage(block(in_channels, out_channels), attention(out_channels) if attends else None)

        self.time = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.classes = nn.Embedding(config.classes + 1, embedding) if config.classes else None
        self.enter = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down = nn.ModuleList()
        skips, current = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(stage(current, width, level))
                current = width
                skips.append(current)
            if level + 1 < len(widths):
                self.down.append(_Stage(block(current, current, "down")))
                skips.append(current)

        self.middle = nn.ModuleList(
            [_Stage(block(current, current), attention(current)), _Stage(block(current, current))]
        )

        self.up = nn.ModuleList()
        self.takes_skip: list[bool] = []  # every stage on the way up, but for those that change the resolution
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(stage(current + skips.pop(), width, level))
                self.takes_skip.append(True)
                current = width
            if level:
                self.up.append(_Stage(block(current, current, "up")))
                self.takes_skip.append(False)

        self.norm = group_norm(current)
        self.leave = _zeroed(nn.Conv2d(current, config.out_channels, 3, padding=1))

    def set_attention(self, attention: Attention) -> UNet:
        """Switches every attention block to diffkern's kernels or to torch's, with the same weights; the network.

        ``attention``: "diffkern", or "torch", which `torch.onnx.export` needs; equal within rounding. The config
        follows. ValueError for another.
        """
        self.config = dataclasses.replace(self.config, attention=attention)
        for module in self.modules():
            if isinstance(module, SpatialSelfAttention):
                module.attention = attention
        return self

    @property
    def null_class(self) -> int:
        """The class index that means "no condition"."""
        return self.config.classes

    def embed(self, t: Tensor, cond: Tensor | None, batch: int) -> Tensor:
        """[B, E]: the embedding of the time plus that of the class."""
        if t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, batch)):
            raise ValueError(f"t must be 0-dim or have one time for each of the {batch} samples, got {tuple(t.shape)}")
        embedding: Tensor = self.time(
            sinusoidal_embedding(t.reshape(-1) * self.config.time_scale, self.config.embedding).to(
                self.enter.weight.dtype
            )
        )
        embedding = embedding.expand(batch, -1)
        if self.classes is None:
            if cond is not None:
                raise ValueError("this network has no classes, but cond was given")
            return embedding
        if cond is None:
            cond = torch.full((batch,), self.null_class, dtype=torch.int64, device=t.device)
        if cond.shape != (batch,) or cond.is_floating_point():
            raise ValueError(
                f"cond must be an integer tensor of shape ({batch},), got {cond.dtype} {tuple(cond.shape)}"
            )
        return embedding + self.classes(cond)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        config = self.config
        expected = (config.in_channels, config.image_size, config.image_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        embedding = self.embed(t, cond, x.shape[0])
        h = self.enter(x)
        skips = [h]
        for stage in self.down:
            h = stage(h, embedding)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, embedding)
        for stage, takes_skip in zip(self.up, self.takes_skip, strict=True):
            h = stage(torch.cat([h, skips.pop()], dim=1) if takes_skip else h, embedding)
        out: Tensor = self.leave(F.silu(self.norm(h)))
        return out
