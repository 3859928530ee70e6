"""Which UNet is meant, as plain data: every option of the family."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from diffkern import records
from diffkern.checks import unknown
from diffkern.names import Attention
from diffkern.nn.heads import check_attention, count_heads
from diffkern.nn.levels import Levels

Block = Literal["residual", "convnext"]
Modulation = Literal["scale_shift", "add"]
Resampling = Literal["residual", "conv", "pool"]
TimeEmbedding = Literal["sinusoidal", "fourier"]
Place = Literal["after", "before"]
UpAttention = Literal["every", "last"]
Padding = Literal["symmetric", "asymmetric"]
InputSkips = Literal["none", "residual"]
Upsampling = Literal["nearest", "bilinear"]

LARGEST = 1 << 20
"""Of every size in a configuration, and of the channels of a level."""
_SIZES = ("in_channels", "out_channels", "channels", "groups", "group_channels")
_COUNTS = (
    "classes",
    "concat_channels",
    "context_channels",
    "vector_channels",
    "ids",
    "id_channels",
    "augment_channels",
)
_WORDS = {
    "block": Block,
    "modulation": Modulation,
    "resample": Resampling,
    "time_embedding": TimeEmbedding,
    "class_place": Place,
    "up_attention": UpAttention,
    "downsample_padding": Padding,
    "input_skips": InputSkips,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig(Levels):
    """Everything that decides the shape of a `UNet`, as plain data. Presets of the papers: `diffkern.nn.PRESETS`.

    Images and levels:

    image_size         height and width the network is made for (a number or a pair; None: says none); it takes every
                       size that is divisible by 2^(levels - 1)
    in_channels        channels of x_t
    out_channels       channels of the prediction
    learned_variance   the output has as many channels again, the v of Nichol and Dhariwal 2021 (lecture 002)
    concat_channels    channels of an image that is concatenated to x_t (inpainting, super-resolution), 0 for none
    concat_upsample    how such an image is brought to the size of x_t: "nearest", "bilinear", or None: it has that size
    channels           channels of the first level
    multipliers        channels of level l are ``channels * multipliers[l]``; each level halves the resolution
    enter_channels     channels of the first convolution; None: those of the first level
    blocks             blocks in each level on the way down, a number or one a level (one more on the way up)

    Blocks:

    block              "residual" (pre-activation: GroupNorm, SiLU, convolution, twice) or "convnext" (depthwise 7 x 7,
                       LayerNorm, 1 x 1, GELU, 1 x 1)
    modulation         "scale_shift": adaptive group norm, (1 + scale) GroupNorm(h) + shift; "add": GroupNorm(h + shift)
    resample           between levels: "residual" (the BigGAN block), "conv" (a convolution of stride 2; repetition and
                       a convolution) or "pool" (the mean of 2 x 2; repetition)
    filter             taps of the FIR filter of "residual" and "pool" ((1, 3, 3, 1), say); None: 2 x 2 mean, repetition
    downsample_padding of "conv": "symmetric", one pixel around, or "asymmetric", one at the right and below (DDPM)
    resampled_skip_conv  whether the skip of a block that resamples always has a 1 x 1 convolution (EDM's SongUNet)
    input_skips        "residual": the input, halved by a convolution, is added at every level (NCSN++)
    residual_scale     of every sum with a skip: 1, or sqrt(1/2) (Song et al. 2021)
    groups             groups of a GroupNorm, at most; the largest number that divides the channels is taken
    group_channels     channels of a group, at least
    eps                of the GroupNorms
    dropout            before the second convolution of a block
    zero_init          whether blocks start as their skips, and the network at 0

    Attention:

    attention_levels   levels with attention after each block
    up_attention       on the way up after "every" block of these levels, or after the "last" alone (EDM's SongUNet)
    middle_attention   whether the middle of the network has attention
    heads              attention heads, or, where it is given,
    head_channels      channels of a head: multiples of 8 up to 256, or 512
    transformer_depth  0: a block of self-attention; else so many transformer blocks, a number or one a level
    context_channels   width of the context tokens that transformer blocks attend to, 0 for none
    attention_eps      of the GroupNorm before attention; None: ``eps``
    attention          "diffkern", or "torch": the same formulas in torch's operators, norms too, as ONNX needs them

    Conditions:

    embedding          width of the embedding of time and class; None: four times ``channels``
    time_embedding     "sinusoidal", or "fourier": random frequencies (Song et al. 2021)
    time_channels      width of the sinusoids; None: ``channels``
    time_sin_first     sines before cosines
    time_freq_shift    the largest period is that of index width / 2 - shift
    time_scale         the time is multiplied by this before the sinusoids (1000 for times in [0, 1])
    fourier_scale      standard deviation of the random frequencies
    classes            number of classes, 0 for none; class index ``classes`` is "no condition"
    class_place        the class embedding is added "after" the layers of the time embedding or "before" them (SongUNet)
    class_scale        the class embedding is multiplied by this
    class_bias         a vector that is added to it, for no class too (SongUNet)
    vector_channels    width of an extra vector (SDXL's pooled text), 0 for none
    ids, id_channels   so many numbers (SDXL's sizes), each as a sinusoid of so many channels
    augment_channels   width of EDM's augmentation labels, 0 for none
    """

    image_size: int | tuple[int, int] | None = 8
    in_channels: int = 1
    out_channels: int = 1
    learned_variance: bool = False
    concat_channels: int = 0
    concat_upsample: Upsampling | None = None
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    enter_channels: int | None = None
    blocks: int | tuple[int, ...] = 2
    block: Block = "residual"
    modulation: Modulation = "scale_shift"
    resample: Resampling = "residual"
    filter: tuple[float, ...] | None = None
    downsample_padding: Padding = "symmetric"
    resampled_skip_conv: bool = False
    input_skips: InputSkips = "none"
    residual_scale: float = 1.0
    groups: int = 8
    group_channels: int = 1
    eps: float = 1e-5
    dropout: float = 0.0
    zero_init: bool = True
    attention_levels: tuple[int, ...] = (1,)
    up_attention: UpAttention = "every"
    middle_attention: bool = True
    heads: int = 4
    head_channels: int | None = None
    transformer_depth: int | tuple[int, ...] = 0
    context_channels: int = 0
    attention_eps: float | None = None
    attention: Attention = "diffkern"
    embedding: int | None = None
    time_embedding: TimeEmbedding = "sinusoidal"
    time_channels: int | None = None
    time_sin_first: bool = False
    time_freq_shift: float = 0.0
    time_scale: float = 1.0
    fourier_scale: float = 16.0
    classes: int = 10
    class_place: Place = "after"
    class_scale: float = 1.0
    class_bias: bool = False
    vector_channels: int = 0
    ids: int = 0
    id_channels: int = 256
    augment_channels: int = 0

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_levels", "blocks", "transformer_depth", "filter", "image_size"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        self._check_sizes()
        self._check_levels()
        for name, words in _WORDS.items():
            if getattr(self, name) not in get_args(words):
                raise ValueError(unknown(f"UNetConfig.{name}", getattr(self, name), get_args(words)))
        if self.concat_upsample not in (None, *get_args(Upsampling)):
            raise ValueError(
                unknown("UNetConfig.concat_upsample", self.concat_upsample, (*get_args(Upsampling), "None"))
            )
        check_attention("UNetConfig.attention", self.attention)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"UNetConfig.dropout must lie in [0, 1), got {self.dropout}")
        if isinstance(self.image_size, tuple) and len(self.image_size) != 2:
            raise ValueError(f"UNetConfig.image_size must be a number or (height, width), got {self.image_size}")
        for name in ("time_scale", "time_freq_shift", "fourier_scale", "class_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"UNetConfig.{name} must be finite, got {getattr(self, name)}")
        for name in ("residual_scale", "eps", "attention_eps"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"UNetConfig.{name} must be positive and finite, got {value}")
        if self.filter is not None and (len(self.filter) % 2 or not self.filter or sum(self.filter) == 0):
            raise ValueError(f"UNetConfig.filter must be an even number of taps whose sum is not 0, got {self.filter}")
        if not 0.0 <= self.time_freq_shift < self.sinusoids // 2:
            raise ValueError(
                f"UNetConfig.time_freq_shift must lie in [0, {self.sinusoids // 2}), got {self.time_freq_shift}"
            )

    def _check_sizes(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"UNetConfig.{name} must be at least 1, got {getattr(self, name)}")
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise ValueError(f"UNetConfig.{name} must not be negative, got {getattr(self, name)}")
        for name in ("embedding", "enter_channels", "time_channels", "head_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"UNetConfig.{name} must be at least 1, got {value}")
        if self.head_channels is None and self.heads < 1:
            raise ValueError(f"UNetConfig.heads must be at least 1, got {self.heads}")
        for name in (*_SIZES, *_COUNTS, "embedding", "enter_channels", "time_channels", "head_channels", "heads"):
            value = getattr(self, name)
            if value is not None and value > LARGEST:
                raise ValueError(f"UNetConfig.{name} must be at most {LARGEST}, got {records.shown(value)}")
        for name, value in (("time_channels", self.sinusoids), ("id_channels", self.id_channels)):
            if value % 2:
                raise ValueError(f"UNetConfig.{name} must be even, got {value}")

    def _check_levels(self) -> None:
        levels = len(self.multipliers)
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"UNetConfig.multipliers must be positive integers, one a level, got {self.multipliers}")
        if levels > 16 or max(self.multipliers) > LARGEST // self.channels:
            raise ValueError(
                f"UNetConfig.multipliers must be at most 16, each at most {LARGEST // self.channels} for "
                f"{self.channels} channels, got {records.shown(self.multipliers)}"
            )
        for name, least in (("blocks", 1), ("transformer_depth", 0)):
            value = getattr(self, name)
            every = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"UNetConfig.{name} must be a number or one for each of the {levels} levels, got {value}"
                )
            if not all(least <= number <= 1024 for number in every):
                raise ValueError(
                    f"UNetConfig.{name} must be at least {least}, at most 1024, got {records.shown(value)}"
                )
        for size in self.size or ():
            if size < 1 or size > LARGEST or size % self.divisor:
                raise ValueError(
                    f"UNetConfig.image_size must be divisible by {self.divisor} for {levels} levels, got "
                    f"{records.shown(self.image_size)}"
                )
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(f"UNetConfig.attention_levels must lie in [0, {levels}), got {self.attention_levels}")
        for level in {*self.attention_levels, *([levels - 1] if self.middle_attention else [])}:
            try:
                count_heads(self.channels * self.multipliers[level], self.heads, self.head_channels)
            except ValueError as error:
                name = "heads" if self.head_channels is None else "head_channels"
                raise ValueError(f"UNetConfig.{name} does not fit level {level}: {error}") from None
            if self.context_channels and not self.depths[level]:
                raise ValueError(
                    f"UNetConfig.transformer_depth must be at least 1 where there is a context, got 0 for level {level}"
                )

    @property
    def divisor(self) -> int:
        """What height and width must be divisible by."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def block_counts(self) -> tuple[int, ...]:
        """Blocks of every level on the way down."""
        return self.blocks if isinstance(self.blocks, tuple) else (self.blocks,) * len(self.multipliers)

    @property
    def depths(self) -> tuple[int, ...]:
        """Transformer blocks of every level, 0 for plain attention."""
        depth = self.transformer_depth
        return depth if isinstance(depth, tuple) else (depth,) * len(self.multipliers)

    @property
    def sinusoids(self) -> int:
        """Width of the sinusoids of the time."""
        return self.channels if self.time_channels is None else self.time_channels

    @property
    def embedding_width(self) -> int:
        """Width of the embedding of time and class."""
        return 4 * self.channels if self.embedding is None else self.embedding

    @property
    def predicted_channels(self) -> int:
        """Channels of the output."""
        return self.out_channels * (2 if self.learned_variance else 1)

    @property
    def stages(self) -> int:
        """Blocks of the network, each with weights of its own."""
        levels = len(self.multipliers)
        between = 2 * (levels - 1) if self.resample == "residual" else 0
        return sum(2 * count + 1 for count in self.block_counts) + between + 2

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> UNetConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(UNetConfig, values, "UNetConfig.")
