"""Storing a `Diffusion` in a folder, and opening it again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffkern.names import TimesName, WeightingName
from diffkern.objectives.time_sampling import TimeSampler
from diffkern.objectives.weightings import Weighting
from diffkern.schedules.base import Schedule

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

__all__ = ["InFolders", "Weight"]

Weight = WeightingName | Weighting | Callable[[Tensor, str], Tensor]


class InFolders(nn.Module):
    """The methods of a `Diffusion` that write and read files."""

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: plain data, functions and foreign networks by name alone."""
        from diffkern.diffusion import _files  # here, so that the chain of imports stays short

        return _files.described(cast("Diffusion", self))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        weights: Mapping[str, Tensor] | None = None,
        average: str | None = None,
        autoencoder: bool = True,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a folder, each whole or not at all.

        A network of `diffkern.nn` is described in full; any other, and a schedule, weighting or time sampler made of
        functions, is named only, and has to be given to `from_pretrained` again. ``weights`` are tensors to write for
        those of the network that have their names, such as an average; ``average`` names what then is
        ``average-NAME.safetensors``, beside the others. Needs safetensors. OSError for a disk that is full.

        The autoencoder of a model in latents goes into the folder ``autoencoder`` inside, with the map of previews, or
        is named only: with ``autoencoder=False``, where it lies there or in the run's folder already, and where it is
        none of `diffkern.nn`.
        """
        from diffkern.diffusion import _files

        diffusion = cast("Diffusion", self)
        _files.save(diffusion, folder, weights or {}, average)
        if autoencoder:
            self.save_autoencoder(folder)

    def save_autoencoder(self, folder: str | os.PathLike[str]) -> None:
        """Writes the autoencoder of a model in latents, with its map of previews, into FOLDER/autoencoder.

        Nothing is done without one, for one that is none of `diffkern.nn`, and where it lies there already. ValueError
        where another lies there.
        """
        from diffkern.diffusion import _autoencoder

        _autoencoder.save(cast("Diffusion", self), folder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module | None = None,
        *,
        schedule: Schedule | None = None,
        weight: Weight | None = None,
        times: TimesName | TimeSampler | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        average: str | None = None,
        autoencoder: nn.Module | None = None,
        **hub: Any,
    ) -> Self:
        """What `save_pretrained` wrote, from a folder or a repository "owner/name" of the hub, in evaluation mode.

        The folder of a training run gives its newest checkpoint; ``average`` which of its weights ("0.100",
        "plain", "raw": as trained), the first average if None.

        ``model``, ``schedule``, ``weight``, ``times``: what the file can only name. The schedule given must be the one
        of the file. ``autoencoder``: that of a model in latents, by its hash, where it is not in the folder beside it;
        a checkpoint has it in the folder of its run. ``dtype`` is that of the weights in the file if None. ``hub``
        (``revision``, ``subfolder``, ``token`` ...) goes to huggingface_hub. Nothing that the file says is imported or
        run; ValueError in one sentence for a file that does not fit.
        """
        from diffkern.diffusion import _files

        own: dict[str, Any] = {"schedule": schedule, "weight": weight, "times": times, "autoencoder": autoencoder}
        found = _files.load(cast("type[Diffusion]", cls), path, model, **own, average=average, hub=hub)
        return cast(Self, found.to(device=device, dtype=dtype).eval())
