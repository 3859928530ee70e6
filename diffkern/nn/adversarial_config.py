"""What a `Generator` and a `Discriminator` are made from: plain data, which a checkpoint stores."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

from diffkern import records
from diffkern.checks import unknown

Normalisation = Literal["none", "group", "batch"]
"""Group norm looks at one example alone; batch norm at all that a process has at once."""
GeneratorCondition = Literal["none", "concatenation", "embedding", "modulation"]
GeneratorActivation = Literal["relu", "silu"]
Enlarging = Literal["transposed", "nearest"]
Form = Literal["dcgan", "patch"]
DiscriminatorCondition = Literal["none", "projection", "embedding", "concatenation"]

LARGEST = 1 << 20
"""Of every size in a configuration."""
MOST_LEVELS = 12


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Everything that decides the shape of a `Generator`, as plain data.

    image_size         height and width of the images, or (height, width): a start size times 2 for each level
    out_channels       of an image
    latent_channels    numbers of z, standard normals
    channels           of the level before the image
    multipliers        widths in `channels`, a level each, the finest first; each level doubles the size, so that 28
                       with two of them starts at 7, and 32 with three at 4
    norm               "group" (`groups`), "none", or "batch" as in DCGAN: the images of a batch then depend on each
                       other in training mode, and two processes do not train like one
    groups, eps        of the group normalisation; eps of the batch's too
    activation         "silu" (one op with the group norm), or "relu" as in DCGAN
    resample           "transposed": 4 x 4 transposed convolutions of stride 2; "nearest": repetition and a 3 x 3
                       convolution
    condition          how a class enters: "none"; "concatenation": one-hot beside z (arXiv 1411.1784); "embedding": a
                       learned vector beside z; "modulation": a learned scale and shift after every norm
                       (arXiv 1802.05637)
    classes            number of classes, 0 where condition is "none"
    embedding          width of the learned vector

    ValueError for values that make no network. `gan_presets` has the published one.
    """

    image_size: int | tuple[int, int] = 28
    out_channels: int = 1
    latent_channels: int = 64
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    norm: Normalisation = "group"
    groups: int = 8
    eps: float = 1e-5
    activation: GeneratorActivation = "silu"
    resample: Enlarging = "transposed"
    condition: GeneratorCondition = "none"
    classes: int = 0
    embedding: int = 64

    def __post_init__(self) -> None:
        records.check_fields(self, "GeneratorConfig.")
        _check_counts(self, ("out_channels", "latent_channels", "channels", "groups", "embedding"))
        _check_levels(self)
        _check_words(self, norm=Normalisation, activation=GeneratorActivation, resample=Enlarging)
        _check_words(self, condition=GeneratorCondition)
        _check_classes(self)
        if self.condition == "modulation" and self.norm == "none":
            raise ValueError(
                "GeneratorConfig.norm must be 'group' or 'batch' where condition is 'modulation', got 'none'"
            )
        size = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        factor = 2 ** len(self.multipliers)
        if any(not 1 <= n <= LARGEST or n % factor for n in size):
            raise ValueError(
                f"GeneratorConfig.image_size must be divisible by {factor} for {len(self.multipliers)} levels, got "
                f"{records.shown(self.image_size)}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.out_channels, *self.size

    @property
    def start(self) -> tuple[int, int]:
        """Height and width that z is laid out on."""
        factor = 2 ** len(self.multipliers)
        return self.size[0] // factor, self.size[1] // factor

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> GeneratorConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(GeneratorConfig, values, "GeneratorConfig.")


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Everything that decides the shape of a `Discriminator`, as plain data.

    form               "dcgan": one logit an image; "patch": a map of logits, each of a patch (PatchGAN)
    image_size         height and width of the images, or (height, width), divisible by 2 for each convolution of stride
                       2; "patch" may have None for images of any size
    in_channels        of an image
    channels           of the first level
    multipliers        widths in `channels`, a 4 x 4 convolution each, which halves the size; the last one of "patch"
                       has stride 1, so that the published patches of 70 x 70 are (1, 2, 4, 8)
    norm               before the activations but the first: "none", "group", or "batch" as in DCGAN and PatchGAN. Batch
                       norm makes an image's logit depend on the others of its process: then two processes do not
                       train like one, and a gradient penalty has no meaning (arXiv 1704.00028)
    groups, eps        of the group normalisation; eps of the batch's too
    slope              of the leaky ReLU below 0
    spectral_norm      torch's own on every weight: the largest singular value of each is 1 (arXiv 1802.05957)
    condition          "none"; "projection": the inner product of the last features and a vector of the class is added
                       to the logits (arXiv 1802.05637); "embedding": a learned vector of the class as planes beside the
                       image; "concatenation": one-hot planes beside the image (arXiv 1411.1784), or, with
                       `cond_channels`, another image beside it (arXiv 1611.07004)
    classes            number of classes, 0 where none is given
    cond_channels      channels of the image beside the image, 0 for none
    embedding          width of the learned vector of "embedding"

    ValueError for values that make no network.
    """

    form: Form = "dcgan"
    image_size: int | tuple[int, int] | None = 28
    in_channels: int = 1
    channels: int = 32
    multipliers: tuple[int, ...] = (1, 2)
    norm: Normalisation = "none"
    groups: int = 8
    eps: float = 1e-5
    slope: float = 0.2
    spectral_norm: bool = True
    condition: DiscriminatorCondition = "none"
    classes: int = 0
    cond_channels: int = 0
    embedding: int = 4

    def __post_init__(self) -> None:
        records.check_fields(self, "DiscriminatorConfig.")
        _check_counts(self, ("in_channels", "channels", "groups", "embedding"))
        _check_levels(self)
        _check_words(self, form=Form, norm=Normalisation, condition=DiscriminatorCondition)
        if not 0 <= self.cond_channels <= LARGEST:
            raise ValueError(f"DiscriminatorConfig.cond_channels must lie in 0..{LARGEST}, got {self.cond_channels}")
        if self.cond_channels and (self.condition != "concatenation" or self.classes):
            raise ValueError(
                "DiscriminatorConfig.cond_channels must be 0 unless condition is 'concatenation' and classes is 0, got "
                f"{self.cond_channels}"
            )
        if not self.cond_channels:
            _check_classes(self)
        if not 0.0 <= self.slope <= 1.0:
            raise ValueError(f"DiscriminatorConfig.slope must lie in [0, 1], got {self.slope}")
        if self.image_size is None and self.form == "dcgan":
            raise ValueError("DiscriminatorConfig.image_size must be given where form is 'dcgan', got None")
        for n in self.size or ():
            if not 1 <= n <= LARGEST or n % self.divisor:
                raise ValueError(
                    f"DiscriminatorConfig.image_size must be divisible by {self.divisor} for {len(self.multipliers)} "
                    f"levels, got {records.shown(self.image_size)}"
                )
        if self.size is not None and min(self.logits) < 1:
            raise ValueError(
                f"DiscriminatorConfig.image_size must leave a logit of each patch of {self.patch} pixels, got "
                f"{records.shown(self.image_size)}"
            )

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width of the images; None for any."""
        return (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size

    @property
    def halvings(self) -> int:
        """Convolutions of stride 2."""
        return len(self.multipliers) - (1 if self.form == "patch" else 0)

    @property
    def divisor(self) -> int:
        """What height and width of an image must be divisible by."""
        return int(2**self.halvings)

    @property
    def patch(self) -> int:
        """Height and width in pixels of what one logit of "patch" sees: 70 for the published one."""
        seen = 7  # two convolutions of 4 x 4 and stride 1
        for _ in range(self.halvings):
            seen = 2 * seen + 2
        return seen

    @property
    def logits(self) -> tuple[int, int]:
        """Height and width of the map of logits of images of `image_size`; ValueError where that is None."""
        if self.size is None:
            raise ValueError("DiscriminatorConfig.image_size must be given, got None")
        if self.form == "dcgan":
            return 1, 1
        return self.size[0] // self.divisor - 2, self.size[1] // self.divisor - 2

    @property
    def given_channels(self) -> int:
        """Channels that the first convolution sees: those of the image and of the condition beside it."""
        beside = {"embedding": self.embedding, "concatenation": self.classes or self.cond_channels}
        return self.in_channels + beside.get(self.condition, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DiscriminatorConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(DiscriminatorConfig, values, "DiscriminatorConfig.")


Config = GeneratorConfig | DiscriminatorConfig


def _check_counts(config: Config, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not 1 <= value <= LARGEST:
            raise ValueError(f"{type(config).__name__}.{name} must lie in 1..{LARGEST}, got {records.shown(value)}")
    if not 0.0 < config.eps < math.inf:
        raise ValueError(f"{type(config).__name__}.eps must be positive and finite, got {config.eps}")


def _check_levels(config: Config) -> None:
    most = LARGEST // config.channels
    fits = 1 <= len(config.multipliers) <= MOST_LEVELS and all(1 <= n <= most for n in config.multipliers)
    if not fits:
        raise ValueError(
            f"{type(config).__name__}.multipliers must be 1 to {MOST_LEVELS} numbers, each in 1..{most} for "
            f"{config.channels} channels, got {records.shown(config.multipliers)}"
        )


def _check_words(config: Config, **words: Any) -> None:
    for name, known in words.items():
        value = getattr(config, name)
        if value not in get_args(known):
            raise ValueError(unknown(f"{type(config).__name__}.{name}", value, get_args(known)))


def _check_classes(config: Config) -> None:
    name = type(config).__name__
    least = 0 if config.condition == "none" else 1
    if config.condition == "none" and config.classes:
        raise ValueError(f"{name}.classes must be 0 where condition is 'none', got {records.shown(config.classes)}")
    if not least <= config.classes <= LARGEST:
        raise ValueError(
            f"{name}.classes must lie in 1..{LARGEST} where condition is {config.condition!r}, got "
            f"{records.shown(config.classes)}"
        )
