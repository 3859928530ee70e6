"""What training an autoencoder is about: the autoencoder, the discriminator beside it, and what compares images."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.checks import unknown
from diffkern.nn import PRESETS, Autoencoder, AutoencoderConfig, Discriminator, DiscriminatorConfig, stored
from diffkern.train.config import TrainConfig
from diffkern.train.options import adversarial_options, network_values

if TYPE_CHECKING:
    from diffkern.train.perceptual import Perceptual

__all__ = ["AutoencoderTraining", "make_autoencoder", "make_discriminator"]

KEY, FORMAT = "diffkern_autoencoder_training", 1


@dataclasses.dataclass(frozen=True)
class _Config:
    """What config.json holds beside the number of its format."""

    autoencoder: dict[str, Any]
    discriminator: dict[str, Any] | None


class _Networks(nn.Module):
    """All that is trained."""

    def __init__(self, autoencoder: Autoencoder, discriminator: nn.Module | None) -> None:
        super().__init__()
        self.autoencoder, self.discriminator = autoencoder, discriminator

    @property
    def checkpointing(self) -> bool:
        """The autoencoder's."""
        return self.autoencoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.autoencoder.checkpointing = value


class AutoencoderTraining(nn.Module):
    """An `Autoencoder`, a `Discriminator` of images or none, and a perceptual distance or none.

    What `diffkern.train.fit` trains for the objective "autoencoder". Its checkpoints hold both networks; what is used
    afterwards is ``.autoencoder``. ``perceptual`` is a function of two batches of images, `diffkern.train.perceptual`;
    it is not trained, and not stored.
    """

    def __init__(
        self, autoencoder: Autoencoder, discriminator: nn.Module | None = None, perceptual: Perceptual | None = None
    ) -> None:
        super().__init__()
        if not isinstance(autoencoder, Autoencoder):
            raise ValueError(f"autoencoder must be an Autoencoder, got {type(autoencoder).__name__}")
        if discriminator is not None and not isinstance(discriminator, nn.Module):
            raise ValueError(f"discriminator must be a torch.nn.Module, got {type(discriminator).__name__}")
        self.model = _Networks(autoencoder, discriminator)
        self._perceptual = (perceptual,)  # in a tuple, so that a module is not one of ours

    @property
    def autoencoder(self) -> Autoencoder:
        """What is wanted."""
        return self.model.autoencoder

    @property
    def discriminator(self) -> nn.Module | None:
        """What it is trained against."""
        return self.model.discriminator

    @property
    def perceptual(self) -> Perceptual | None:
        """(x, y) to [B]."""
        return self._perceptual[0]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """(C, H, W) that the autoencoder is made for; None where its configuration says no size."""
        config = self.autoencoder.config
        return None if config.size is None else (config.in_channels, *config.size)

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        critic = self.discriminator
        config = _Config(stored.network_data(self.autoencoder), None if critic is None else stored.network_data(critic))
        return {KEY: FORMAT, **dataclasses.asdict(config)}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        weights: Mapping[str, Tensor] | None = None,
        average: str | None = None,
    ) -> None:
        """Both networks in a folder, as `diffkern.Diffusion.save_pretrained` writes one."""
        given = {f"model.{name}": tensor for name, tensor in (weights or {}).items()}
        stored.save(self, self.to_dict(), folder, given, average)

    @classmethod
    def begun(
        cls, path: str | os.PathLike[str], config: TrainConfig, shape: tuple[int, int, int]
    ) -> AutoencoderTraining:
        """`from_pretrained`, or of the folder of an `Autoencoder` alone that; in float32, as from every checkpoint.

        With the configuration's discriminator where there is none yet.
        """
        place = Path(path) / "config.json"
        data = records.parse(place.read_bytes(), "JSON", str(place)) if place.is_file() else None
        if isinstance(data, dict) and "diffkern_autoencoder" in data:
            found = cls(Autoencoder.from_pretrained(path).float())
        else:
            found = cls.from_pretrained(path)
        return found if found.discriminator is not None else cls(found.autoencoder, make_discriminator(config, shape))

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        average: str | None = None,
        device: torch.device | str = "cpu",
    ) -> AutoencoderTraining:
        """What `save_pretrained` wrote, or the newest checkpoint of a run, in evaluation mode."""
        config_path, weights_path = stored.files(path, average, {}, "AutoencoderTraining")
        data = stored.read_config(config_path, KEY, FORMAT, "the training of an autoencoder")
        config = records.record(_Config, data, f"{config_path}: ")
        contents = stored.contents(weights_path)
        made: dict[str, Any] = {}
        for name, entry in (("autoencoder", config.autoencoder), ("discriminator", config.discriminator)):
            if entry is not None:
                prefix = f"model.{name}."
                within = functools.partial(_Within, name)
                made[name] = stored.network_from(entry, contents.under(prefix), str(path), within, name)
        found = cls(**made)
        stored.fill(found, weights_path)
        return found.to(device).eval()


class _Within(nn.Module):
    """The network under the names that its tensors have in the file."""

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.add_module(name, network)


def make_autoencoder(config: TrainConfig, shape: tuple[int, int, int]) -> AutoencoderTraining:
    """What the configuration trains on images [C, H, W], with its first weights, which come from ``config.seed`` alone.

    ``config.network`` is the name of an autoencoder in `diffkern.nn.PRESETS`, or another objective's default: none of
    them. ``network_options`` are fields of `AutoencoderConfig`. There is a discriminator of patches where
    ``adversarial["weight"]`` is not 0. ValueError for names and fields that there are not.
    """
    known = {name: found for name, found in PRESETS.items() if isinstance(found, AutoencoderConfig)}
    if config.network != TrainConfig.network and config.network not in known:
        raise ValueError(unknown("TrainConfig.network of the objective 'autoencoder'", config.network, list(known)))
    base = known.get(config.network, AutoencoderConfig())
    channels, height, width = shape
    size = height if height == width else (height, width)
    own = {**base.to_dict(), "image_size": size, "in_channels": channels}
    values = network_values("network_options", own, config.network_options, "AutoencoderConfig")
    made = records.record(AutoencoderConfig, values, "AutoencoderConfig.")
    with torch.random.fork_rng(devices=[]):  # the first weights come from torch's own generator
        torch.manual_seed(config.seed)
        autoencoder = Autoencoder(made)
    return AutoencoderTraining(autoencoder, make_discriminator(config, shape))


def make_discriminator(config: TrainConfig, shape: tuple[int, int, int]) -> Discriminator | None:
    """That of `make_autoencoder`; None where it has no weight."""
    options = adversarial_options(config)
    if options.weight == 0.0:
        return None
    channels, height, width = shape
    size = height if height == width else (height, width)
    base = DiscriminatorConfig(form="patch", image_size=size, in_channels=channels).to_dict()
    values = network_values("adversarial.discriminator", base, options.discriminator, "DiscriminatorConfig")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed + 1)
        return Discriminator(records.record(DiscriminatorConfig, values, "DiscriminatorConfig."))
