"""training.json: what a checkpoint holds beside tensors, read field by field and compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffkern.records import parse, record, shown

__all__ = ["FORMAT", "KEY", "TRAINING", "Training", "read", "same"]

KEY, FORMAT, TRAINING = "diffkern_training", 1, "training.json"


@dataclasses.dataclass(frozen=True)
class Training:
    """What it holds beside the number of its format."""

    step: int
    world: int
    torch: str
    averages: tuple[str, ...]
    averaged: int
    """The step of the averages' last update."""
    optimizer: dict[str, Any] | None
    files: dict[str, Any]
    extra: dict[str, Any]


def read(path: Path) -> Training:
    """training.json, whose list of files is compared with the folder's."""
    place = path / TRAINING
    if not place.is_file():
        raise FileNotFoundError(f"there is no {TRAINING} in {path}, so that training cannot go on from it")
    data = parse(place.read_bytes(), "JSON", str(place))
    number = data.pop(KEY, None) if isinstance(data, dict) else data
    if type(number) is not int or number != FORMAT:
        raise ValueError(f"{place} must be of a checkpoint with {KEY} = {FORMAT}, got {shown(number)}")
    found = record(Training, data, f"{place}: ")
    for name, size in found.files.items():
        file = path / str(name)
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            raise ValueError(
                f"{file} must have {shown(size)} bytes, got {'no such file' if got is None else got}: the checkpoint "
                f"is damaged, and without the folder {path} training goes on from the one before"
            )
    return found


def same(found: Any, wanted: Any, path: Path, name: str = "") -> None:
    """ValueError that names the first place where plain data differ."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in (*found, *(key for key in wanted if key not in found)):
            same(found.get(key), wanted.get(key), path, f"{name}.{key}" if name else str(key))
    elif isinstance(found, list | tuple) and isinstance(wanted, list | tuple) and len(found) == len(wanted):
        for i, (here, there) in enumerate(zip(found, wanted, strict=True)):
            same(here, there, path, f"{name}[{i}]")
    elif found != wanted:
        raise ValueError(f"{name} must be {shown(found)}, as in {path}, got {shown(wanted)}")
