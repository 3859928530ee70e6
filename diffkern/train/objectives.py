"""The objectives of training by name, and the model object that a configuration and its data make."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from diffkern import records
from diffkern.checks import meant, unknown
from diffkern.diffusion import Diffusion
from diffkern.names import Prediction, SamplerName, TimesName
from diffkern.nn import (
    AutoencoderConfig,
    DiT,
    DiTConfig,
    TextConditioned,
    TextEncoderConfig,
    UNet,
    UNetConfig,
    Vocabulary,
    preset,
)
from diffkern.objectives.time_sampling import LossSecondMoment, TimeSampler, get_time_sampler
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.makers import SCHEDULES
from diffkern.train.config import Objective, TrainConfig
from diffkern.train.degraded import degradation_of, network_fields

__all__ = ["OBJECTIVES", "ObjectiveParts", "make_diffusion", "make_network", "resampling"]


class ObjectiveParts(NamedTuple):
    """What an objective's name stands for."""

    schedule: str
    prediction: Prediction
    sampler: SamplerName
    """What its pictures are sampled by, where nothing else is asked."""
    times: TimesName | None = None
    learned_variance: bool = False


OBJECTIVES: dict[Objective, ObjectiveParts] = {
    "eps": ObjectiveParts("linear", "eps", "ddim"),  # Ho et al. 2020, arXiv 2006.11239, eq. 14; lectures 000, 001, 002
    "x0": ObjectiveParts("cosine", "x0", "ddim"),  # the same, section 3.2; lecture 002
    "v": ObjectiveParts("cosine", "v", "ddim"),  # Salimans & Ho 2022, arXiv 2202.00512
    "edm": ObjectiveParts("edm", "edm", "heun"),  # Karras et al. 2022, arXiv 2206.00364, table 1
    "flow": ObjectiveParts("flow", "velocity", "euler"),  # Lipman et al. 2023, arXiv 2210.02747; lectures 000, 003
    # Song et al. 2021, arXiv 2011.13456: geometric noise levels, sigma^2 |s + eps/sigma|^2, the score as -eps/sigma of
    # what the network puts out (Song & Ermon 2020, arXiv 2006.09011); lectures 000, 001, 003
    "ncsn": ObjectiveParts("ve", "eps", "heun"),
    "hybrid": ObjectiveParts("cosine", "eps", "ddpm", learned_variance=True),  # arXiv 2102.09672, eq. 16; lecture 002
}
"""Schedule, prediction and sampler of every objective; a configuration may ask for another schedule."""


def make_network(
    config: TrainConfig,
    shape: tuple[int, int, int],
    classes: int,
    images: tuple[int, int, int] | None = None,
    vocabulary: Vocabulary | None = None,
) -> UNet | DiT | TextConditioned:
    """The network ``config.network`` for images [C, H, W] of so many classes (0: none), with its first weights.

    ``images``: the shape of the images whose latents have the ``shape``. With a ``vocabulary`` it has an encoder of its
    texts, ``config.text_options``, of the width of its context. Weights come from ``config.seed`` alone. ValueError for
    options that its configuration does not have, for a network that needs more than classes or texts, and for one
    without a context where there are texts.
    """
    base = preset(config.network)
    if isinstance(base, AutoencoderConfig):
        raise ValueError(f"TrainConfig.network must be a network of noise and time, got {config.network!r}")
    known = [field.name for field in dataclasses.fields(base)]
    for name in config.network_options:
        if name not in known:
            near = meant(name, known)
            hint = "" if near is None else f": did you mean {near!r}?"
            raise ValueError(f"TrainConfig.network_options must be fields of {type(base).__name__}, got {name!r}{hint}")
    channels, height, width = shape
    concatenated = network_fields(degradation_of(config), images or shape, shape if images else None)
    for name in concatenated:
        if name not in known:
            raise ValueError(
                f"TrainConfig.network must be a UNet for a degradation, whose image it takes, got {config.network!r}"
            )
    values: dict[str, Any] = {
        **base.to_dict(),
        "image_size": height if height == width else (height, width),
        "in_channels": channels,
        "classes": classes,
        "learned_variance": OBJECTIVES[config.objective].learned_variance,
    }
    if "out_channels" in values:
        values["out_channels"] = channels
    values.update(concatenated)
    made = records.record(type(base), {**values, **config.network_options}, f"{type(base).__name__}.")
    reads = vocabulary is not None
    for name in ("context_channels", "vector_channels", "ids", "concat_channels"):
        allowed = getattr(made, name, 0) if reads and name == "context_channels" else concatenated.get(name) or 0
        if getattr(made, name, 0) != allowed:
            raise ValueError(
                f"TrainConfig.network must need nothing but {'a context' if reads else 'classes'}, got "
                f"{config.network!r} with {name} = {getattr(made, name)}"
            )
    text = None if vocabulary is None else _encoder(config, made, vocabulary)
    with torch.random.fork_rng(devices=[]):  # the first weights come from torch's own generator
        torch.manual_seed(config.seed)
        network = DiT(made) if isinstance(made, DiTConfig) else UNet(made)
        return network if text is None else TextConditioned.of(network, text)


def _encoder(config: TrainConfig, network: UNetConfig | DiTConfig, vocabulary: Vocabulary) -> TextEncoderConfig:
    """The encoder of the texts that the network is given."""
    context = getattr(network, "context_channels", 0)
    if not context:
        raise ValueError(
            f"TrainConfig.network must have a context for the captions of the data, got {config.network!r} without: "
            "network_options with context_channels and transformer_depth (of a UNet) give it one"
        )
    known = {**TextEncoderConfig.of(vocabulary, context_channels=context).to_dict(), **config.text_options}
    return records.record(TextEncoderConfig, known, "TrainConfig.text_options: ")


def make_diffusion(
    config: TrainConfig,
    shape: tuple[int, int, int],
    classes: int = 0,
    network: nn.Module | None = None,
    autoencoder: nn.Module | None = None,
    vocabulary: Vocabulary | None = None,
) -> Diffusion:
    """The model object that the configuration trains on images [C, H, W] of so many classes, or of captions of the
    ``vocabulary``; ``network``: one's own.

    With an ``autoencoder`` it is one of the latents of such images. ValueError for images that it does not take.
    """
    parts = OBJECTIVES[config.objective]
    name = config.schedule or parts.schedule
    if name not in SCHEDULES:
        raise ValueError(unknown("TrainConfig.schedule", name, list(SCHEDULES)))
    try:
        schedule = SCHEDULES[name](**config.schedule_options)
    except TypeError as error:
        raise ValueError(f"TrainConfig.schedule_options must be arguments of {name}, got: {error}") from error
    images = None
    if autoencoder is not None:
        encoder: Any = autoencoder
        images, shape = shape, encoder.latent_shape(shape)
    return Diffusion(
        make_network(config, shape, classes, images, vocabulary) if network is None else network,
        schedule,
        parts.prediction,
        weight=config.weight,
        times=_times(config),
        drop=config.drop if classes or vocabulary is not None else 0.0,
        shape=shape,
        learned_variance=parts.learned_variance,
        autoencoder=autoencoder,
        degradation=degradation_of(config),
    )


def _times(config: TrainConfig) -> TimeSampler | None:
    """The sampler of times; None where the schedule's own is meant, or one with a state, which the run keeps."""
    name = config.times or OBJECTIVES[config.objective].times
    if name is None and config.times_options:
        raise ValueError(f"TrainConfig.times must be a name where times_options are given, got {config.times_options}")
    return None if name is None or name == "loss_second_moment" else _drawn(name, config.times_options)


def _drawn(name: TimesName, options: dict[str, Any], **fixed: Any) -> TimeSampler:
    try:
        return get_time_sampler(name, **fixed, **options)
    except TypeError as error:
        raise ValueError(f"TrainConfig.times_options must be constants of {name}, got: {error}") from error


def resampling(config: TrainConfig, diffusion: Diffusion) -> LossSecondMoment | None:
    """The importance sampler of times where the configuration asks for "loss_second_moment", else None."""
    if config.times != "loss_second_moment":
        return None
    if not isinstance(diffusion.schedule, DiscreteSchedule):
        raise ValueError(f"TrainConfig.times 'loss_second_moment' needs a table, got {diffusion.schedule.name}")
    found = _drawn(config.times, config.times_options, T=diffusion.schedule.T, device="cpu")
    assert isinstance(found, LossSecondMoment)
    return found
