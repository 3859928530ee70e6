"""A folder as diffusers' `save_pretrained` writes it: config.json and diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from diffkern import records, storage
from diffkern.nn.weights._keys import read_state

__all__ = ["read", "write"]

CONFIG, STEM = "config.json", "diffusion_pytorch_model"
_Path: TypeAlias = "str | os.PathLike[str]"


def read(
    path: _Path, subfolder: str | None = None, variant: str | None = None, part: str = "unet"
) -> tuple[Any, dict[str, Tensor]]:
    """(config.json, the tensors by name) of a folder, nothing of which is fetched from elsewhere.

    ``subfolder`` of a pipeline; left out, that of a pipeline (model_index.json) is the ``part``. ``variant``: "fp16"
    for the files that have it in their names; left out, files without, and those of fp16 where there are no others.
    FileNotFoundError for a folder or file that is missing; ValueError for files that are no such ones.
    """
    folder = Path(path) if subfolder is None else Path(path) / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: download it first, as nothing is fetched here")
    if subfolder is None and not (folder / CONFIG).is_file() and (folder / "model_index.json").is_file():
        return read(folder, part, variant)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"there is no {CONFIG} in {folder}: diffusers' save_pretrained writes it")
    config = records.parse((folder / CONFIG).read_bytes(), "JSON", str(folder / CONFIG))
    state: dict[str, Tensor] = {}
    for file in _files(folder, variant):
        state |= read_state(file, file.name)
    return config, state


def _files(folder: Path, variant: str | None) -> list[Path]:
    """The files that hold the weights: one, or what the index of several names."""
    for mark in ("", ".fp16") if variant is None else (f".{variant}",):
        whole, index = folder / f"{STEM}{mark}.safetensors", folder / f"{STEM}.safetensors.index{mark}.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards(index)
    pickled = sorted(folder.glob(f"{STEM}*.bin"))
    if pickled:
        raise ValueError(
            f"{folder} must hold {STEM}.safetensors, got {pickled[0].name}, which is a pickle: let diffusers write it "
            "again by save_pretrained, or read it by diffkern.nn.weights.diffusers.load"
        )
    mark = "" if variant is None else f".{variant}"
    raise FileNotFoundError(f"there is no {STEM}{mark}.safetensors in {folder}, nor an index of its parts")


def _shards(index: Path) -> list[Path]:
    data = records.parse(index.read_bytes(), "JSON", str(index))
    places = data.get("weight_map") if isinstance(data, Mapping) else None
    rule = f"{index} must name the file of every weight in weight_map"
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{rule}, got {records.shown(places)}")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(f"{rule}, beside it, got {records.shown(name)}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {index.parent}, which {index.name} names")
    return [index.parent / name for name in sorted(set(places.values()))]


def write(path: _Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """The two files into the folder, which is made where there is none, each whole or not at all. Needs safetensors."""
    try:
        save = importlib.import_module("safetensors.torch").save_file
    except ImportError as error:
        raise ImportError(f"writing {path} needs safetensors, which cannot be imported ({error})") from None
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with storage.whole(folder / CONFIG) as described, storage.whole(folder / f"{STEM}.safetensors") as weights:
        save({name: tensor.contiguous() for name, tensor in state.items()}, str(weights), metadata={"format": "pt"})
        described.write_text(json.dumps(config, indent=2) + "\n")
