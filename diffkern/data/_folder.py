"""Images in a folder and the folders in it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffkern.data._build import Entry, Source
from diffkern.data._captions import Captions
from diffkern.data._pixels import pillow

__all__ = ["SUFFIXES", "names_in", "source_of"]

FORMATS = "png jpg jpeg jfif bmp gif webp avif tif tiff ppm pgm pbm pnm tga jp2 j2k"
SUFFIXES = frozenset(f".{name}" for name in FORMATS.split())
"""Of files that are images; others in a folder are none of ours."""


def names_in(folder: Path, suffixes: frozenset[str] = SUFFIXES) -> list[str]:
    """The files of a suffix in the folder and below, through links too, as sorted paths relative to it, with "/".

    What begins with a dot, and what a Mac leaves in archives (__MACOSX), is not looked at.
    """
    found = []
    seen: set[tuple[int, int]] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        inside = Path(place).relative_to(folder)
        found += [
            (inside / name).as_posix()
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
        ]
    return sorted(found)


def source_of(
    folder: Path, names: list[str], numbers: list[int], labelled: bool = True, captioned: bool = False
) -> Source:
    """Of the images of all ``names`` those at the ``numbers``; classes are the subfolders, in the order of their names,
    where every image lies in one. ``captioned``: captions in their place."""
    classes: tuple[str, ...] | None = None
    if labelled and all("/" in name for name in names):
        classes = tuple(sorted({_top(name) for name in names}))
    label = {name: number for number, name in enumerate(classes or ())}
    names = [names[i] for i in numbers]
    states = [os.stat(folder / name) for name in names]
    identity = [[name, state.st_size, state.st_mtime_ns] for name, state in zip(names, states, strict=True)]
    captions = Captions(folder) if captioned else None
    told = [] if captions is None else [["captions", *map(captions.identity, names)]]

    def entries() -> Iterator[Entry]:
        for name in names:
            text = None if captions is None else captions.of(name)
            yield Entry(name, functools.partial(_open, folder / name), label.get(_top(name)), text)

    return Source(entries(), len(names), classes, ["folder", classes, identity, *told], threads=True)


def _top(name: str) -> str:
    return name.partition("/")[0]


def _open(path: Path) -> Any:
    with open(path, "rb") as file:
        image = pillow().open(file)
        image.load()
    return image
