"""Pictures of any source, decoded once and laid one behind the other."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from diffkern.data._pixels import Fit, pillow
from diffkern.progress import progress_bar

__all__ = ["Entry", "Source", "Table", "build", "unreadable"]

AT_ONCE = 256
"""Pictures that are decoded before the first of them is written."""


class Entry(NamedTuple):
    """One picture of a source."""

    name: str
    load: Callable[[], Any]
    """Its picture, as `Fit` takes it."""
    label: int | None
    text: str | None = None
    """Its caption, of sources that are opened with captions."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Pictures in their order."""

    entries: Iterable[Entry]
    count: int | None
    """How many; None: not known before the end."""
    classes: tuple[str, ...] | None
    """None: numbers, as many as the labels have, where they have any."""
    identity: Any
    """What tells these pictures from others, as JSON: the cache goes by it. None: nothing cheap does, so no cache."""
    threads: bool = False
    """Whether pictures may be loaded side by side."""


@dataclasses.dataclass(frozen=True)
class Table:
    """What was laid: of each picture its shape and its label (-1: none), and what could not be read."""

    shapes: np.ndarray
    """int64 [N, 3]: c, h, w."""
    labels: np.ndarray
    """int64 [N]."""
    digest: str
    """Of all pixels."""
    bad: list[str]
    """Names, each with its reason."""
    texts: list[str] | None = None
    """Captions, where all have one."""


def build(source: Source, fit: Fit, file: BinaryIO, skip_bad: bool, progress: bool | str) -> Table:
    """Writes the pixels of all pictures to the file. ValueError for those that cannot be read, unless they are to be
    skipped, for pictures of different sizes where the fit has none, and for labels that some have and others lack."""
    content = hashlib.blake2b(digest_size=16)
    shapes, labels, bad, texts = [], [], [], []
    first: tuple[str, tuple[int, ...]] | None = None
    bar = progress_bar(progress, "reading images", float("inf") if source.count is None else source.count, unit="image")
    with contextlib.nullcontext() if bar is None else contextlib.closing(bar):
        for entry, found in _fitted(source, fit):
            if bar is not None:
                bar.update()
            if isinstance(found, Exception):
                bad.append(f"{entry.name} ({_reason(found)})")
                continue
            first = first or (entry.name, found.shape)
            if fit.size is None and found.shape[1:] != first[1][1:]:
                sizes = [f"{name} is {shape[2]} x {shape[1]}" for name, shape in (first, (entry.name, found.shape))]
                raise ValueError(f"size must be given where images are of several, got None: {', '.join(sizes)}")
            data = np.ascontiguousarray(found).data
            content.update(data)
            file.write(data)
            shapes.append(found.shape)
            labels.append(-1 if entry.label is None else entry.label)
            texts.append((entry.name, entry.text))
    if bad and not skip_bad:
        raise ValueError(unreadable(bad, len(bad) + len(shapes)))
    if not shapes:
        raise ValueError(f"source must have an image that can be read, got {len(bad)} that cannot: {_named(bad)}")
    if len({label < 0 for label in labels}) == 2:
        raise ValueError(
            f"labels must belong to all images or to none, got {labels.count(-1)} of {len(labels)} without"
        )
    told = [text for _, text in texts if text is not None]
    if told and len(told) < len(texts):
        first_without = next(name for name, text in texts if text is None)
        raise ValueError(
            f"captions must belong to all images or to none, got {len(texts) - len(told)} of {len(texts)} without: "
            f"{first_without}"
        )
    table = np.array(shapes, np.int64).reshape(-1, 3), np.array(labels, np.int64)
    return Table(*table, content.hexdigest(), bad, told or None)


def unreadable(bad: list[str], count: int) -> str:
    """The sentence of an error about images that cannot be read."""
    return f"{len(bad)} of {count} images cannot be read: {_named(bad)}; skip_bad=True leaves them out"


def _named(bad: list[str]) -> str:
    return ", ".join(bad[:10]) + (", ..." if len(bad) > 10 else "")


def _fitted(source: Source, fit: Fit) -> Iterator[tuple[Entry, Any]]:
    """Every entry in order, with its array or what went wrong with it."""

    def one(entry: Entry) -> Any:
        try:
            return fit(entry.load())
        except Exception as error:  # files that are broken raise what they like: SyntaxError, struct.error ...
            return error

    pillow()  # said once where it is missing, not of every picture
    if not source.threads:
        yield from ((entry, one(entry)) for entry in source.entries)
        return
    entries = iter(source.entries)
    with ThreadPoolExecutor() as pool:
        while part := list(itertools.islice(entries, AT_ONCE)):
            yield from zip(part, pool.map(one, part), strict=True)


def _reason(error: Exception) -> str:
    if isinstance(error, pillow().UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
