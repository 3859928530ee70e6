"""Configurations of published runs, by name; flags and YAML change what another data set needs."""

from __future__ import annotations

import dataclasses

from diffkern.train.config import TrainConfig

__all__ = ["PRESETS"]

_AUTOENCODER = TrainConfig(
    objective="autoencoder",
    network_options={
        "channels": 16,
        "multipliers": (1, 2, 4),
        "blocks": 1,
        "groups": 8,
        "latent_channels": 2,
        "middle_attention": False,
    },
    data="mnist5k",
    validation=500,
    iterations=1200,
    batch=32,
    learning_rate=1e-3,
    warmup=100,
    decay="cosine",
    final_rate=0.02,
    betas=(0.9, 0.99),
    averages=(),
    plain_average=0.99,
    save_every=300,
)

PRESETS: dict[str, TrainConfig] = {
    # 8 x 8 digits of ten classes in minutes on two cores
    "digits": TrainConfig(
        network="digits",
        schedule="cosine",
        data="digits",
        iterations=600,
        learning_rate=2e-3,
        warmup=100,
        decay="cosine",
        final_rate=0.02,
        betas=(0.9, 0.99),
        plain_average=0.99,
        averages=(),
        guidance=1.5,
        log_every=10,
        save_every=200,
        validation=297,
    ),
    # the same with captions ("seven, thick") in place of classes
    "digits-text": TrainConfig(
        network="digits",
        network_options={"transformer_depth": 1, "context_channels": 64},
        schedule="cosine",
        data="digits-text",
        text=True,
        iterations=400,
        batch=64,
        learning_rate=2e-3,
        warmup=100,
        decay="cosine",
        final_rate=0.02,
        betas=(0.9, 0.99),
        plain_average=0.99,
        averages=(),
        guidance=3.0,
        log_every=10,
        save_every=200,
        validation=297,
    ),
    # Ho et al. 2020, arXiv 2006.11239, appendix B; lectures 000, 001
    "ddpm-cifar10": TrainConfig(
        labels=False,
        flip=True,
        iterations=800_000,
        warmup=5000,
        plain_average=0.9999,
        save_every=10_000,
        sample_every=10_000,
    ),
    # Karras et al. 2022, arXiv 2206.00364, table 7 (without its augmentation labels): 200 M images of batches of 512
    "edm": TrainConfig(
        objective="edm",
        network="edm-cifar10-ddpmpp",
        network_options={"augment_channels": 0},
        flip=True,
        iterations=390_625,
        batch=512,
        learning_rate=1e-3,
        warmup=19_531,
        save_every=5000,
        sample_every=5000,
    ),
    # Lipman et al. 2023, arXiv 2210.02747; sizes of Tong et al. 2023, arXiv 2302.00482
    "flow": TrainConfig(
        objective="flow",
        labels=False,
        flip=True,
        iterations=400_000,
        warmup=5000,
        plain_average=0.9999,
        save_every=10_000,
        sample_every=10_000,
    ),
    # Song et al. 2021, arXiv 2011.13456, appendix H
    "ncsn": TrainConfig(
        objective="ncsn",
        network="edm-cifar10-ncsnpp",
        network_options={"augment_channels": 0},
        labels=False,
        flip=True,
        iterations=1_300_000,
        warmup=5000,
        plain_average=0.999,
        save_every=10_000,
        sample_every=10_000,
    ),
    # Dhariwal & Nichol 2021, arXiv 2105.05233, table 11; lecture 002
    "adm-64": TrainConfig(
        objective="hybrid",
        network="adm-imagenet64",
        size=64,
        crop="center",
        iterations=540_000,
        batch=2048,
        learning_rate=3e-4,
        warmup=0,
        weight_decay=0.0,
        clip=None,
        plain_average=0.9999,
        precision="float16",
        save_every=10_000,
        sample_every=10_000,
    ),
    # the same digits by a GAN in less than five minutes: DCGAN's size, Radford et al. 2015, arXiv 1511.06434; without
    # labels it makes all ten classes too
    "gan-digits": TrainConfig(
        objective="gan",
        network="dcgan-digits",
        data="digits",
        iterations=3000,
        batch=64,
        learning_rate=4e-4,
        warmup=0,
        betas=(0.0, 0.99),
        clip=None,
        averages=(),
        plain_average=0.995,
        save_every=500,
    ),
    # 28 x 28 digits to latents of 7 x 7, f = 4, in a few minutes; the losses of Rombach et al. 2022, arXiv 2112.10752
    "autoencoder-digits": _AUTOENCODER,
    # the same with a codebook, van den Oord et al. 2017, arXiv 1711.00937
    "vq-digits": dataclasses.replace(
        _AUTOENCODER, network_options={**_AUTOENCODER.network_options, "regularisation": "vq", "codes": 128}
    ),
}
"""The starting points of ``diffkern train --preset``."""
