"""A `GAN` in a folder: config.json says what it is, model.safetensors holds the weights of both networks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffkern.names import AdversarialName, GradientPenalty
from diffkern.parallel import bare
from diffkern.records import record

if TYPE_CHECKING:
    from diffkern.gan import GAN

KEY, FORMAT = "diffkern_gan", 1
NETWORKS = ("generator", "discriminator")


@dataclasses.dataclass(frozen=True)
class _Config:
    """What config.json holds beside the number of its format."""

    loss: AdversarialName
    penalty: GradientPenalty | None
    penalty_weight: float
    latent_channels: int
    shape: tuple[int, ...] | None
    generator: dict[str, Any]
    discriminator: dict[str, Any]


class _Stored(nn.Module):
    """The tensors of a file, by their names there: ``model.`` and those of the networks that are given."""

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        self.model = nn.ModuleDict(networks)


def described(gan: GAN) -> dict[str, Any]:
    """See `GAN.to_dict`."""
    from diffkern.nn import stored  # where a network is stored or built alone

    config = _Config(
        loss=gan.loss_kind,
        penalty=gan.penalty,
        penalty_weight=gan.penalty_weight,
        latent_channels=gan.latent_channels,
        shape=gan.shape,
        generator=stored.network_data(gan.generator),
        discriminator=stored.network_data(gan.discriminator),
    )
    return {KEY: FORMAT, **dataclasses.asdict(config)}


def save(gan: GAN, folder: str | os.PathLike[str], weights: Mapping[str, Tensor], average: str | None) -> None:
    """See `GAN.save_pretrained`."""
    from diffkern.nn import stored

    module = _Stored(generator=bare(gan.generator), discriminator=bare(gan.discriminator))
    stored.save(module, described(gan), folder, {f"model.{name}": t for name, t in weights.items()}, average)


def load(
    cls: type[GAN],
    path: str | os.PathLike[str],
    generator: nn.Module | None,
    discriminator: nn.Module | None,
    *,
    average: str | None,
    hub: dict[str, Any],
) -> GAN:
    """See `GAN.from_pretrained`."""
    from diffkern.nn import stored

    config_path, weights_path = stored.files(path, average, hub, "GAN")
    config = record(_Config, stored.read_config(config_path, KEY, FORMAT, "a GAN"), f"{config_path}: ")
    contents = stored.contents(weights_path)
    networks: dict[str, nn.Module] = {}
    for name, given in zip(NETWORKS, (generator, discriminator), strict=True):
        data: dict[str, Any] = getattr(config, name)
        if given is None and "given" in data:
            raise ValueError(
                f"{name} must be given, as {path} was saved with the network {data['given']!r:.200}, which is none of "
                f"diffkern.nn: from_pretrained(path, {name}=network)"
            )
        if given is None:
            part = contents.under(f"model.{name}.")
            given = stored.network_from(data, part, str(path), lambda n, name=name: _Stored(**{name: n}), name)  # type: ignore[misc]
            given.to(contents.dtype) if contents.dtype is not None else given
        networks[name] = given
    found = cls(
        networks["generator"],
        networks["discriminator"],
        config.loss,
        penalty=config.penalty,
        penalty_weight=config.penalty_weight,
        latent_channels=config.latent_channels,
        shape=config.shape,
    )
    stored.fill(_Stored(**{name: bare(network) for name, network in networks.items()}), weights_path)
    return found
