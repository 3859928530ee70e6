"""The autoencoder of a `Diffusion` in a folder of its own, beside the model, or once beside a run's checkpoints.

    FOLDER/autoencoder/     config.json and model.safetensors of a `diffkern.nn.Autoencoder`; preview.json

config.json of the model holds its hash, which is compared where it is opened.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from diffkern import storage
from diffkern.diffusion.latents import hash_of
from diffkern.diffusion.previews import Preview
from diffkern.parallel import class_of

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

__all__ = ["FOLDER", "StoredAutoencoder", "described", "found_in", "restored", "save"]

FOLDER, PREVIEW, CHECKPOINTS = "autoencoder", "preview.json", "checkpoints"
FILES = ("config.json", "model.safetensors")


@dataclasses.dataclass(frozen=True)
class StoredAutoencoder:
    """What config.json of a model says of its autoencoder: the class, and which one (`hash_of`)."""

    name: str
    hash: str


def _class() -> Any:
    from diffkern import nn as networks  # only where a network is stored or built

    return networks.Autoencoder


def described(diffusion: Diffusion) -> StoredAutoencoder | None:
    """Of a diffusion in latents; None of any other."""
    autoencoder = diffusion.autoencoder
    return None if autoencoder is None else StoredAutoencoder(class_of(autoencoder).__name__, hash_of(autoencoder))


def save(diffusion: Diffusion, folder: str | os.PathLike[str]) -> None:
    """See `Diffusion.save_autoencoder`."""
    autoencoder: Any = diffusion.autoencoder
    if autoencoder is None or not isinstance(autoencoder, _class()):
        return
    place, own = Path(folder) / FOLDER, hash_of(autoencoder)
    if not place.is_dir():
        with storage.whole_folder(place) as unfinished:
            autoencoder.save_pretrained(unfinished)
    elif diffusion.__dict__.get("_stored_at") != (place.resolve(), own):  # looked at once, not for every checkpoint
        there = hash_of(_class().from_pretrained(place))
        if there != own:
            raise ValueError(f"{place} must hold the diffusion's autoencoder, of the hash {own}, got {there}")
    diffusion.__dict__["_stored_at"] = (place.resolve(), own)
    if diffusion.preview_map is not None:
        diffusion.preview_map.save(place / PREVIEW)


def restored(
    stored: StoredAutoencoder | None, given: nn.Module | None, folder: Path, hub: dict[str, Any], name: str
) -> tuple[nn.Module | None, Preview | None]:
    """The autoencoder that a model's file names, and its preview: what is given, or from the folder beside it.

    ValueError for another than the model was trained with; FileNotFoundError where there is none.
    """
    if stored is None:
        if given is not None:
            raise ValueError(f"autoencoder must be left out, as the model of {name} is of images, got one")
        return None, None
    place = found_in(folder, hub, name)
    autoencoder = given
    if given is None:
        if place is None:
            raise FileNotFoundError(
                f"there is no {FOLDER} in {folder}, nor beside its run, of the model's hash {stored.hash}: "
                "from_pretrained(path, autoencoder=...)"
            )
        autoencoder = _class().from_pretrained(place)
    assert autoencoder is not None
    found = hash_of(autoencoder)
    if found != stored.hash:
        raise ValueError(
            f"autoencoder must be the one that the network was trained with, of the hash {stored.hash}, got {found} "
            f"({'given' if given is not None else place})"
        )
    preview = None if place is None else place / PREVIEW
    return autoencoder, Preview.load(preview) if preview is not None and preview.is_file() else None


def found_in(folder: Path, hub: dict[str, Any], name: str) -> Path | None:
    """The folder of the autoencoder: in that of the model, beside the checkpoints that it is one of, or on the hub."""
    places = [folder / FOLDER]
    if folder.parent.name == CHECKPOINTS:
        places.append(folder.parent.parent / FOLDER)
    for place in places:
        if (place / FILES[0]).is_file():
            return place
    if Path(name).exists():
        return None
    import huggingface_hub  # the model's own files came by it

    paths = [Path(huggingface_hub.hf_hub_download(name, f"{FOLDER}/{file}", **hub)) for file in FILES]
    return paths[0].parent
