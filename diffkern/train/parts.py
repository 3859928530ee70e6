"""Which part of the loop an objective has: the `Stepper` of what a configuration trains."""

from __future__ import annotations

from typing import Any

from diffkern.train.config import TrainConfig
from diffkern.train.stepper import Stepper

__all__ = ["part_of"]


def part_of(config: TrainConfig, trained: Any = None) -> type[Stepper]:
    """The class for the objective; ValueError where ``trained``, if there is one, is nothing that it trains, and for
    settings of other objectives."""
    kind, part = _part(config)
    if trained is not None and not isinstance(trained, kind):
        raise ValueError(
            f"diffusion must be what TrainConfig.objective {config.objective!r} trains, a {kind.__name__}, got "
            f"{type(trained).__name__}"
        )
    for name, used in (("adversarial", ("gan", "autoencoder")), ("autoencoder", ("autoencoder",))):
        if getattr(config, name) and config.objective not in used:
            raise ValueError(
                f"TrainConfig.{name} must be left out where objective is {config.objective!r}, got "
                f"{getattr(config, name)}"
            )
    return part


def _part(config: TrainConfig) -> tuple[type, type[Stepper]]:
    """What is trained, and how: imported where it is asked for."""
    if config.objective == "gan":
        from diffkern.gan import GAN
        from diffkern.train.adversarial import AdversarialStepper

        return GAN, AdversarialStepper
    if config.objective == "autoencoder":
        from diffkern.train.autoencoder import AutoencoderStepper
        from diffkern.train.reconstruction import AutoencoderTraining

        return AutoencoderTraining, AutoencoderStepper
    from diffkern.diffusion import Diffusion
    from diffkern.train.steps import DiffusionStepper

    return Diffusion, DiffusionStepper
