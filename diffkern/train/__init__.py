"""Training a diffusion, a GAN or an autoencoder: configuration, loop, averages, checkpoints, on one machine or many."""

from __future__ import annotations

from diffkern.train.checkpoint import newest
from diffkern.train.config import TrainConfig, read_yaml
from diffkern.train.ema import Averages
from diffkern.train.fit import Fitted, fit
from diffkern.train.objectives import OBJECTIVES, make_diffusion
from diffkern.train.presets import PRESETS
from diffkern.train.reconstruction import AutoencoderTraining

__all__ = [
    "OBJECTIVES",
    "PRESETS",
    "AutoencoderTraining",
    "Averages",
    "Fitted",
    "TrainConfig",
    "fit",
    "make_diffusion",
    "newest",
    "read_yaml",
]
