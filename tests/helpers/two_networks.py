"""Runs with two networks as small as can be: a GAN of bars, and an autoencoder with a discriminator beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern.data import Batch, Stream, loader, open_images
from diffkern.train import TrainConfig, fit
from diffkern.train.parts import part_of
from diffkern.train.stepper import prepare
from helpers.tiny_run import TINY, tiny_data

GAN = dataclasses.replace(
    TINY,
    objective="gan",
    network="dcgan-digits",
    network_options={"channels": 4, "latent_channels": 3, "groups": 2, "embedding": 4},
    adversarial={"discriminator": {"channels": 4}, "penalty": "gradient", "d_steps": 2},
    schedule=None,
)
AUTOENCODER = dataclasses.replace(
    TINY,
    objective="autoencoder",
    network="ddpm-cifar10",
    network_options={
        "channels": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "groups": 4,
        "latent_channels": 2,
        "middle_attention": False,
        "regularisation": "vq",
        "codes": 8,
    },
    adversarial={"weight": 0.5, "start": 2, "discriminator": {"channels": 4, "multipliers": [1]}, "penalty": "r1"},
    schedule=None,
)


def run(config: TrainConfig, out: Path | None = None, **options: Any) -> Any:
    return fit(None, tiny_data(), config, out=out, progress=False, **options)


def weights(trained: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_step(config: TrainConfig) -> tuple[Any, list[Batch]]:
    """The stepper of the configuration, and the micro-batches of its first iteration."""
    images = open_images(tiny_data())
    part = part_of(config)
    trained = prepare(part.make(config, images, None), config, torch.device("cpu"))
    batches = loader(images, Stream(len(images), 0), batch=config.batch, seed=0, micro_batch=config.micro_batch)
    return part(trained, config, torch.device("cpu")), next(batches)
