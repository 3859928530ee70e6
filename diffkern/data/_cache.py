"""Pictures of a source as arrays: decoded once, and from then on mapped from a folder of the cache."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock

from diffkern import records
from diffkern.data._build import Source, Table, build, unreadable
from diffkern.data._pixels import Fit

__all__ = ["Laid", "folder_of", "laid", "unwritable"]

TEXTS = "texts.json"
FORMAT = 1
"""Of what is in a folder of the cache, and of how pictures become pixels: another number, another folder."""


@dataclasses.dataclass(frozen=True)
class Laid:
    """The pixels of a source, one picture behind the other, and what they are."""

    pixels: np.ndarray
    """uint8, one axis; mapped from a file or in memory."""
    table: Table
    classes: tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class _About:
    """about.json."""

    digest: str
    bad: tuple[str, ...]
    classes: tuple[str, ...] | None


def folder_of(cache: str | os.PathLike[str] | bool | None) -> Path | None:
    """Where arrays are kept: a folder that is given, none for False, else the user's own (XDG_CACHE_HOME)."""
    if cache is False:
        return None
    if cache is None or cache is True:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffkern" / "images"
    return Path(cache)


def unwritable(error: OSError, folder: Path) -> OSError:
    """The error of a cache that cannot be written, as it is raised."""
    wrong = f"{error.strerror or error} at {error.filename or folder}"
    return OSError(
        error.errno, f"cache must be a folder that can be written and has room, got {wrong}: give another, or False"
    )


def laid(source: Source, fit: Fit, folder: Path | None, skip_bad: bool, progress: bool | str) -> Laid:
    """The pictures as pixels: from the cache, or built into it; in memory where there is no folder or no identity.

    Several processes that ask for the same build it once: the others wait. A process that is killed leaves nothing that
    is taken for whole.
    """
    if folder is None or source.identity is None:
        file = io.BytesIO()
        table = build(source, fit, file, skip_bad, progress)
        return Laid(np.frombuffer(file.getbuffer(), np.uint8), table, source.classes)
    key = json.dumps([FORMAT, source.identity, dataclasses.asdict(fit)])
    place = folder / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):
            found = _read(place)
            if found is None:
                _write(place, source, fit, skip_bad, progress)
                found = _read(place)
    except OSError as error:
        raise unwritable(error, folder) from error
    assert found is not None
    if found.table.bad and not skip_bad:
        raise ValueError(unreadable(found.table.bad, len(found.table.bad) + len(found.table.labels)))
    return found


def _write(place: Path, source: Source, fit: Fit, skip_bad: bool, progress: bool | str) -> None:
    """The folder, aside and then renamed. The lock is held, so what lies there is of a process that was killed."""
    part = place.with_name(f"{place.name}.part")
    for leftover in (part, place):
        if leftover.exists():
            shutil.rmtree(leftover)
    part.mkdir()
    try:
        with open(part / "pixels.bin", "xb") as file:
            table = build(source, fit, file, skip_bad, progress)
            _flush(file)
        for name, array in (("shapes.bin", table.shapes), ("labels.bin", table.labels)):
            with open(part / name, "xb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        if table.texts is not None:
            with open(part / TEXTS, "xb") as file:
                file.write(json.dumps(table.texts).encode())
                _flush(file)
        about = _About(table.digest, tuple(table.bad), source.classes)
        with open(part / "about.json", "xb") as file:
            file.write(json.dumps(dataclasses.asdict(about), indent=1).encode())
            _flush(file)
        os.rename(part, place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read(place: Path) -> Laid | None:
    """What was built; None where nothing whole is, so that it is built anew."""
    try:
        about = records.record(_About, records.parse((place / "about.json").read_bytes()))
        shapes, labels = (_array(place / name) for name in ("shapes.bin", "labels.bin"))
        pixels = np.memmap(place / "pixels.bin", np.uint8, "r")
        texts = records.parse((place / TEXTS).read_bytes()) if (place / TEXTS).is_file() else None
    except (OSError, ValueError):
        return None
    if len(labels) != len(shapes) or pixels.size != int(shapes.prod(1).sum()):
        return None
    if texts is not None and len(texts) != len(labels):
        return None
    return Laid(pixels, Table(shapes, labels, about.digest, list(about.bad), texts), about.classes)


def _array(path: Path) -> np.ndarray:
    found: np.ndarray = np.load(path, allow_pickle=False)
    return found
