"""Which autoencoder is meant, as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from diffkern import records
from diffkern.names import Attention
from diffkern.nn.heads import count_heads
from diffkern.nn.levels import Levels

LARGEST = 1 << 20
"""Of every size in a configuration, and of the channels of a level."""
MOST_CODES = 1 << 24
"""Of a codebook, whose distances are made for every position."""
Regularisation = Literal["none", "kl", "vq", "fsq"]
_SIZES = ("in_channels", "channels", "blocks", "latent_channels", "groups", "codes")


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig(Levels):
    """Everything that decides the shape of an `Autoencoder`, as plain data. Published ones: `diffkern.nn.PRESETS`.

    Images and levels:

    image_size         height and width the network is made for (a number or a pair; None: says none); it takes every
                       size that is divisible by the factor
    in_channels        channels of the images
    channels           channels of the first level
    multipliers        channels of level l are ``channels * multipliers[l]``; each level halves the resolution, so that
                       the factor f is 2^(levels - 1)
    blocks             residual blocks in each level of the encoder; the decoder has one more
    groups, eps        of the GroupNorms
    dropout            before the second convolution of a block
    attention_levels   levels with attention of one head after each block
    middle_attention   whether the middle of encoder and decoder has attention of one head; the channels of a head are a
                       multiple of 8 up to 256, or 512
    attention          "diffkern", or "torch": the same formulas in torch's operators, norms too, as ONNX needs them

    Latents:

    regularisation     "kl": a Gaussian for every latent (Kingma and Welling 2013); "vq": the nearest of learned codes
                       (van den Oord and others 2017); "fsq": each channel rounded to one of a few levels (Mentzer and
                       others 2023); "none"
    latent_channels    channels that the encoder puts out for each latent, and that the decoder takes
    quant_conv         whether a 1 x 1 convolution stands between encoder and latents, and
    post_quant_conv    one between latents and decoder
    codes              vectors of the codebook of "vq", and
    code_channels      their channels; None: ``latent_channels``
    decay              of the averages that the codes are, per update; None: codes are trained by gradients
    restart_below      codes whose average count is below this share of the mean count start again, 0 for never
    fsq_levels         levels of each channel of "fsq"; their number is that of the channels

    Around diffusion:

    scale, shift       what diffusion is trained on is (z - shift) scale: numbers, or one for each channel of z
    upcast             whether a float16 network computes in float32, as SDXL's must: see `Autoencoder.decode`
    """

    image_size: int | tuple[int, int] | None = 32
    in_channels: int = 3
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 2
    groups: int = 32
    eps: float = 1e-6
    dropout: float = 0.0
    attention_levels: tuple[int, ...] = ()
    middle_attention: bool = True
    attention: Attention = "diffkern"
    regularisation: Regularisation = "kl"
    latent_channels: int = 4
    quant_conv: bool = True
    post_quant_conv: bool = True
    codes: int = 256
    code_channels: int | None = None
    decay: float | None = 0.99
    restart_below: float = 0.05
    fsq_levels: tuple[int, ...] = ()
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0
    upcast: bool = True

    def __post_init__(self) -> None:
        records.check_fields(self, "AutoencoderConfig.")
        if self.channels < 1:
            raise ValueError(f"AutoencoderConfig.channels must be at least 1, got {self.channels}")
        self._check_levels()
        self._check_sizes()
        self._check_latents()
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"AutoencoderConfig.dropout must lie in [0, 1), got {self.dropout}")
        if not 0.0 < self.eps < math.inf:
            raise ValueError(f"AutoencoderConfig.eps must be positive and finite, got {self.eps}")

    def _check_sizes(self) -> None:
        for name in (*_SIZES, "code_channels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"AutoencoderConfig.{name} must be at least 1, got {value}")
            if value is not None and value > (MOST_CODES if name == "codes" else LARGEST):
                most = MOST_CODES if name == "codes" else LARGEST
                raise ValueError(f"AutoencoderConfig.{name} must be at most {most}, got {records.shown(value)}")
        for size in self.size or ():
            if size < 1 or size > LARGEST or size % self.factor:
                raise ValueError(
                    f"AutoencoderConfig.image_size must be divisible by {self.factor} for {len(self.multipliers)} "
                    f"levels, got {records.shown(self.image_size)}"
                )

    def _check_levels(self) -> None:
        levels = len(self.multipliers)
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"AutoencoderConfig.multipliers must be positive integers, one a level, got {self.multipliers}"
            )
        if levels > 16 or max(self.multipliers) > LARGEST // self.channels:
            raise ValueError(
                f"AutoencoderConfig.multipliers must be at most 16, each at most {LARGEST // self.channels} for "
                f"{self.channels} channels, got {records.shown(self.multipliers)}"
            )
        if any(not 0 <= level < levels for level in self.attention_levels):
            raise ValueError(
                f"AutoencoderConfig.attention_levels must lie in [0, {levels}), got {self.attention_levels}"
            )
        for level in {*self.attention_levels, *([levels - 1] if self.middle_attention else [])}:
            try:
                count_heads(self.widths[level])
            except ValueError as error:
                raise ValueError(f"AutoencoderConfig.channels does not fit level {level}: {error}") from None

    def _check_latents(self) -> None:
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise ValueError(f"AutoencoderConfig.decay must lie in [0, 1), got {self.decay}")
        if not 0.0 <= self.restart_below < 1.0:
            raise ValueError(f"AutoencoderConfig.restart_below must lie in [0, 1), got {self.restart_below}")
        if (self.regularisation == "fsq") != bool(self.fsq_levels):
            raise ValueError(
                f'AutoencoderConfig.fsq_levels must be given for the regularisation "fsq" and for no other, got '
                f"{self.fsq_levels} for {self.regularisation!r}"
            )
        if self.fsq_levels and (min(self.fsq_levels) < 2 or math.prod(self.fsq_levels) > 2**62):
            raise ValueError(
                "AutoencoderConfig.fsq_levels must be at least 2 each, their product at most 2^62, got "
                f"{records.shown(self.fsq_levels)}"
            )
        if self.z_channels != self.latent_channels and not (self.quant_conv and self.post_quant_conv):
            name = "fsq_levels" if self.fsq_levels else "code_channels"
            raise ValueError(
                f"AutoencoderConfig.{name} must give {self.latent_channels} channels, the latent_channels, without the "
                f"convolutions around the latents, got {self.z_channels}"
            )
        for name, value in (("scale", self.scale), ("shift", self.shift)):
            every = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) and len(value) != self.z_channels:
                raise ValueError(
                    f"AutoencoderConfig.{name} must be a number or one for each of the {self.z_channels} channels of "
                    f"the latents, got {records.shown(value)}"
                )
            if name == "scale" and min(every) <= 0.0:
                raise ValueError(f"AutoencoderConfig.scale must be positive, got {records.shown(value)}")

    @property
    def factor(self) -> int:
        """f: an image of H x W pixels has H / f x W / f latents; both must be divisible by it."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def z_channels(self) -> int:
        """Channels of a latent z."""
        if self.regularisation == "vq" and self.code_channels is not None:
            return self.code_channels
        return len(self.fsq_levels) or self.latent_channels

    @property
    def code_count(self) -> int:
        """Codes that a latent may be: of the codebook, of all combinations of levels, or 0."""
        return {"vq": self.codes, "fsq": math.prod(self.fsq_levels)}.get(self.regularisation, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> AutoencoderConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(AutoencoderConfig, values, "AutoencoderConfig.")
