"""Shards of WebDataset: tar files whose members are samples, "KEY.jpg" the picture and "KEY.cls" the label of one."""

from __future__ import annotations

import functools
import glob
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffkern.data._build import Entry, Source
from diffkern.data._captions import as_text
from diffkern.data._folder import FORMATS
from diffkern.data._pixels import pillow
from diffkern.extras import need

__all__ = ["SUFFIXES", "expanded", "source_of"]

SUFFIXES = frozenset({".tar", ".tgz"})
PICTURES = frozenset(FORMATS.split())


def expanded(pattern: str) -> list[Path]:
    """The files that "shard-{000..012}.tar" or "shard-*.tar" names; ValueError where one is missing."""
    found: list[Path] = []
    for one in need("braceexpand", "webdataset", "data").braceexpand(pattern):
        names = sorted(glob.glob(one)) if glob.has_magic(one) else [one] if os.path.isfile(one) else []
        if not names:
            raise ValueError(f"source must name tar files, got {pattern!r}: there is no {one}")
        found += map(Path, names)
    return found


def source_of(paths: list[Path], labelled: bool = True, captioned: bool = False) -> Source:
    """The samples of the shards, in their order. A shard that is cut is a picture that cannot be read. ``captioned``:
    with the captions KEY.txt."""
    identity = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

    def entries() -> Iterator[Entry]:
        for path in paths:
            yield from _shard(path, labelled, captioned)

    kind = ["webdataset", labelled, *(["captions"] if captioned else []), identity]
    return Source(entries(), None, None, kind, threads=True)


def _shard(path: Path, labelled: bool, captioned: bool) -> Iterator[Entry]:
    samples = need("webdataset", "webdataset", "data").tarfile_samples([{"url": str(path.resolve())}])
    while True:
        try:
            sample = next(samples, None)
        except Exception as error:  # of tarfile, and of what it was packed with
            yield Entry(path.name, functools.partial(_cut, error), None)
            return
        if sample is None:
            return
        name = f"{path.name}: {sample['__key__']}"
        pictures = [key for key in sample if key.rpartition(".")[2] in PICTURES]
        label = sample.get("cls") if labelled else None
        text = as_text(sample["txt"], f"{name}.txt") if captioned and "txt" in sample else None
        yield Entry(name, functools.partial(_open, [sample[key] for key in pictures]), _number(label, name), text)


def _number(label: bytes | None, name: str) -> int | None:
    try:
        return None if label is None else int(label)
    except ValueError:
        raise ValueError(f"labels must be integers, got {label!r} at {name}.cls") from None


def _open(pictures: list[bytes]) -> Any:
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} pictures")
    return pillow().open(io.BytesIO(pictures[0]))


def _cut(error: Exception) -> None:
    raise ValueError(f"ends early: {error.args[0] if error.args else type(error).__name__}") from error
