"""What a configuration says of objectives with two networks: the entries of its dictionaries, field by field."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from diffkern import records
from diffkern.checks import meant
from diffkern.names import AdversarialName, GradientPenalty
from diffkern.train.config import TrainConfig

__all__ = [
    "AdversarialOptions",
    "AutoencoderOptions",
    "adversarial_options",
    "autoencoder_options",
    "check_unused",
    "network_values",
]

Reconstruction = Literal["l1", "l2"]
_UNUSED: dict[str, Any] = {
    **dict.fromkeys(("schedule", "weight", "times", "sampler", "guidance", "latents", "degradation")),
    **{name: {} for name in ("schedule_options", "times_options", "degradation_options", "text_options")},
}
"""Fields of diffusion models alone, and what they are where they are left out."""
_OTHERS = {"gan": ("weight", "start"), "autoencoder": ("d_steps",)}
"""Entries of ``adversarial`` of the other objective alone."""


@dataclasses.dataclass(frozen=True)
class AdversarialOptions:
    """``TrainConfig.adversarial``: the discriminator of the objectives "gan" and "autoencoder", and its loss."""

    loss: AdversarialName | None = None
    """Name in `diffkern.objectives.adversarial.ADVERSARIAL`; None: "non_saturating" of a GAN, "hinge" beside an
    autoencoder, as in VQGAN."""
    penalty: GradientPenalty | None = None
    """Of the discriminator's gradient: "gradient" (arXiv 1704.00028), "r1", "r2", "r1_r2" (arXiv 1801.04406); None:
    none."""
    penalty_weight: float = 10.0
    """Its factor."""
    d_steps: int = 1
    """Steps of the discriminator in an iteration, on the same images with latents of their own each."""
    learning_rate: float | None = None
    """The peak of the discriminator's; None: the generator's. Its curve is the same."""
    betas: tuple[float, float] | None = None
    """The discriminator's of AdamW; None: the generator's."""
    discriminator: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `diffkern.nn.DiscriminatorConfig` to change; size, channels and classes are those of the data."""
    weight: float = 0.0
    """Beside an autoencoder: the adversarial term's factor, on top of the adaptive one; 0: no discriminator."""
    start: int = 0
    """Beside an autoencoder: the first iteration with a discriminator (arXiv 2012.09841)."""
    collapse_steps: int = 200
    """After so many iterations with a discriminator that is sure, or says nothing, the log has a warning."""

    def __post_init__(self) -> None:
        _check_each(self, "adversarial", whole={"d_steps": 1, "start": 0, "collapse_steps": 1})
        if self.learning_rate is not None and not self.learning_rate > 0.0:
            raise ValueError(f"TrainConfig.adversarial.learning_rate must be positive, got {self.learning_rate}")
        if self.betas is not None and not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"TrainConfig.adversarial.betas must be in [0, 1), got {self.betas}")
        _check_weights(self, "adversarial", ("penalty_weight", "weight"))


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """``TrainConfig.autoencoder``: the terms of an autoencoder's loss beside the adversarial one."""

    reconstruction: Reconstruction = "l1"
    """The mean over an image of |x - r| or of (x - r)^2."""
    perceptual: str | None = None
    """A name of `diffkern.train.perceptual.PERCEPTUAL`: what compares features; None: nothing."""
    perceptual_weight: float = 1.0
    """Its factor."""
    kl_weight: float = 1e-6
    """Of KL(q(z | x) || N(0, 1)) divided by the numbers of an image, so that 1e-6 is that of LDM (arXiv 2112.10752)."""
    codebook_weight: float = 1.0
    """Of the codebook's term, where codes are trained by gradients, not by averages."""
    commitment_weight: float = 0.25
    """Of the commitment's term (arXiv 1711.00937, eq. 3)."""

    def __post_init__(self) -> None:
        _check_each(self, "autoencoder", whole={})
        names = ("perceptual_weight", "kl_weight", "codebook_weight", "commitment_weight")
        _check_weights(self, "autoencoder", names)


def adversarial_options(config: TrainConfig) -> AdversarialOptions:
    """Of the configuration's dictionary; ValueError for a name that there is not (with the nearest) or another type."""
    return _read(AdversarialOptions, config.adversarial, "adversarial")


def autoencoder_options(config: TrainConfig) -> AutoencoderOptions:
    """Of the configuration's dictionary; ValueError as above."""
    return _read(AutoencoderOptions, config.autoencoder, "autoencoder")


def check_unused(config: TrainConfig) -> None:
    """ValueError for settings that mean nothing, or that cannot be had, where two networks are trained."""
    for name, absent in _UNUSED.items():
        value = getattr(config, name)
        if value != absent:
            raise _refused(name, "left out", config, value)
    given, plain = adversarial_options(config), AdversarialOptions()
    for name in _OTHERS[config.objective]:
        if getattr(given, name) != getattr(plain, name):
            raise _refused(f"adversarial.{name}", "left out", config, getattr(given, name))
    if config.precision == "float16":
        raise _refused("precision", "'float32' or 'bfloat16'", config, config.precision)
    if config.shard != "ddp":
        raise _refused("shard", "'ddp'", config, config.shard)
    for name in ("compile", "text"):
        if getattr(config, name):
            raise _refused(name, "False", config, True)


def network_values(what: str, base: Mapping[str, Any], options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """A network's configuration with the options over it; ValueError for one that it does not have."""
    for name in options:
        if name not in base:
            near = meant(name, list(base))
            hint = "" if near is None else f": did you mean {near!r}?"
            raise ValueError(f"TrainConfig.{what} must be fields of {kind}, got {name!r}{hint}")
    return {**base, **options}


def _refused(name: str, rule: str, config: TrainConfig, value: Any) -> ValueError:
    return ValueError(
        f"TrainConfig.{name} must be {rule} where objective is {config.objective!r}, got {records.shown(value)}"
    )


def _read(made: type[Any], values: dict[str, Any], name: str) -> Any:
    known = [field.name for field in dataclasses.fields(made)]
    for key in values:
        if key not in known:
            near = meant(key, known)
            hint = "" if near is None else f": did you mean {near!r}?"
            raise ValueError(f"TrainConfig.{name} has no entry {records.shown(key)}{hint}")
    return records.record(made, values, f"TrainConfig.{name}.")


def _check_each(made: object, name: str, whole: dict[str, int]) -> None:
    records.check_fields(made, f"TrainConfig.{name}.")
    for field, least in whole.items():
        if not least <= getattr(made, field) <= 10**9:
            raise ValueError(f"TrainConfig.{name}.{field} must be in {least}..{10**9}, got {getattr(made, field)}")


def _check_weights(made: object, name: str, fields: tuple[str, ...]) -> None:
    for field in fields:
        if not 0.0 <= getattr(made, field) < math.inf:
            raise ValueError(f"TrainConfig.{name}.{field} must not be negative, got {getattr(made, field)}")
