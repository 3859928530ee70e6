"""What training and evaluation ask of images: a number, a shape, labels, and a batch by index."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffkern import ops
from diffkern.integers import as_integer, integer
from diffkern.vocabulary import Vocabulary

__all__ = ["Images", "Retold", "Subset", "check_indices", "digest", "drawn", "retold", "split"]


class Images(ABC):
    """Images of one shape, by index: what `open_images` returns, and what a class of one's own derives from.

    A subclass sets ``shape``, has `__len__` and `batch`, and sets ``classes`` and ``labels`` if it has labels. For
    ``loader(workers=...)`` it must be picklable where Python starts processes by spawning.
    """

    shape: tuple[int, int, int]
    """C, H, W of what `batch` returns."""
    classes: tuple[str, ...] | None = None
    """Names of the classes 0, 1, ...; None: no labels."""
    labels: Tensor | None = None
    """int64 [N], classes, or int64 [N, L], captions as tokens of the ``vocabulary``; on the CPU. None: no labels."""
    vocabulary: Vocabulary | None = None
    """The words of the captions, of images that have them."""
    skipped: int = 0
    """How many images of the source could not be read and were left out (``skip_bad``)."""
    augmentation: tuple[str, ...] = ()
    """What `batch` does by seeds: "flip", half of the images from left to right (stream AUGMENTATION), "crop" or other
    words. A class of one's own says what it does, so that what is kept of its images (`latents.encoded`) is right."""

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal, of what the data are: another means that a run resumes on other data. As long as a class sets no
        better one, of number, shape, classes and labels alone."""
        labels = None if self.labels is None else self.labels.numpy()
        words = () if self.vocabulary is None else (self.vocabulary.words,)
        return digest(repr((len(self), self.shape, self.classes, *words)), labels)

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, N."""

    @abstractmethod
    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The images of ``indices``, int64 [B]: x0 float32 [B, C, H, W] in [-1, 1], and their labels, int64 [B]
        (of captions int64 [B, L]).

        ``seeds``, int64 [B]: random flips and crops, a function of each image's seed alone (stream AUGMENTATION); None:
        none of either, crops are at the centre.
        """


def check_indices(indices: Tensor, seeds: Tensor | None, count: int) -> None:
    """ValueError unless ``indices`` are int64 [B] in 0 .. count - 1 and ``seeds``, if any, int64 [B]."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        found = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
        raise ValueError(f"indices must be int64 [B], got {found}")
    outside = indices[(indices < 0) | (indices >= count)]
    if outside.numel():
        raise ValueError(f"indices must lie in 0..{count - 1}, got {int(outside[0])}")
    if seeds is not None and (seeds.dtype != torch.int64 or seeds.shape != indices.shape):
        raise ValueError(f"seeds must be int64 [{len(indices)}], got {seeds.dtype} {list(seeds.shape)}")


WHOLE = 4096
"""Rows of an array that `digest` takes in, where there are more."""


def digest(*parts: bytes | str | np.ndarray | None) -> str:
    """A hash of 32 hexadecimal digits. An array counts by its dtype, its shape, and its rows: all, or of many 4096 at
    even distances with the last."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str}{part.shape}".encode())
            rows = part if part.ndim < 2 or len(part) <= WHOLE else part[_spread(len(part), WHOLE)]
            found.update(np.ascontiguousarray(rows).data)
        else:
            found.update(b"-" if part is None else part.encode() if isinstance(part, str) else part)
        found.update(b"|")
    return found.hexdigest()


def _spread(count: int, n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64) * (count - 1) // (n - 1)


class Subset(Images):
    """Some of the images, in the order of ``indices``, int64 [n]."""

    def __init__(self, images: Images, indices: Tensor) -> None:
        check_indices(indices, None, len(images))
        self.images = images
        self.indices = indices
        self.shape = images.shape
        self.classes = images.classes
        self.vocabulary = images.vocabulary
        self.labels = None if images.labels is None else images.labels[indices]
        self.skipped = images.skipped
        self.augmentation = images.augmentation
        self.fingerprint = digest(images.fingerprint, indices.numpy())

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Those of the whole."""
        check_indices(indices, seeds, len(self))
        return self.images.batch(self.indices[indices], seeds)


class _Words(Protocol):
    def tokens(self, texts: list[str], /) -> Tensor: ...


class Retold(Images):
    """The same images, their captions as tokens of other ``words``: a `Vocabulary`, or what else has ``tokens(texts)``,
    such as a network that reads texts."""

    def __init__(self, images: Images, words: _Words) -> None:
        if images.vocabulary is None or images.labels is None:
            raise ValueError("images must have captions to be retold, got none: open them with labels='text'")
        self.images = images
        self.shape = images.shape
        self.skipped = images.skipped
        self.augmentation = images.augmentation
        self.vocabulary = words if isinstance(words, Vocabulary) else None
        told, places = torch.unique(images.labels, dim=0, return_inverse=True)
        self.labels = words.tokens(images.vocabulary.texts(told)).cpu()[places]
        self.fingerprint = images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Theirs, with the captions retold."""
        x0, _ = self.images.batch(indices, seeds)
        assert self.labels is not None
        return x0, self.labels[indices]


def retold(images: Images, words: _Words) -> Images:
    """Images whose captions are tokens of these ``words``; ValueError for one that is none of them, as of `Vocabulary`,
    and for images without captions."""
    return images if images.vocabulary is not None and images.vocabulary == words else Retold(images, words)


def drawn(count: int, n: int, seed: int = 0) -> Tensor:
    """n of the numbers 0 .. count - 1 at random, bool [count]: those whose address (seed, number) comes first.

    The draw depends on seed and numbers alone: where images are added at the end, those drawn before mostly stay.
    """
    first = torch.argsort(ops.seeds(seed, count), stable=True)[:n]
    mask = torch.zeros(count, dtype=torch.bool)
    mask[first] = True
    return mask


def split(images: Images, validation: int | float, seed: int = 0) -> tuple[Images, Images]:
    """The images in two parts, for training and for validation, each in the order of the whole.

    ``validation``: how many are kept for it, as an integer, or which share of all in (0, 1), rounded and at least one.
    Which ones is a function of ``seed`` and of each image's index: the same in every run and on every machine. Raises
    ValueError where either part would be empty.
    """
    count = len(images)
    number = as_integer(validation)
    if number is None:
        share = float(validation) if isinstance(validation, float | np.floating) else math.nan
        if not 0.0 < share < 1.0:
            raise ValueError(f"validation must be a number of images or a share in (0, 1), got {validation!r}")
        number = max(1, round(share * count))
    if not 0 < number < count:
        raise ValueError(f"validation must leave images on both sides of {count}, got {validation!r}")
    mask = drawn(count, number, integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits"))
    training, kept = torch.nonzero(~mask)[:, 0], torch.nonzero(mask)[:, 0]
    return Subset(images, training), Subset(images, kept)
