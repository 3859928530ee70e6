"""Images as arrays in memory or mapped from a file, augmented as they are read."""

from __future__ import annotations

import dataclasses
import hashlib
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkern import streams
from diffkern.data.images import Images, check_indices
from diffkern.draws import uniform_by_address
from diffkern.pixels import from_bytes
from diffkern.vocabulary import Vocabulary

__all__ = ["About", "ArrayImages", "Mapping", "RaggedImages", "received", "sent"]


class Mapping(NamedTuple):
    """Where an array lies that is mapped from a file."""

    filename: str
    dtype: str
    offset: int
    shape: tuple[int, ...]


def sent(array: np.ndarray) -> np.ndarray | Mapping:
    """An array for another process: of a mapped file where it is, any other as it is."""
    if isinstance(array, np.memmap) and array.flags.c_contiguous and array.filename is not None:
        return Mapping(str(array.filename), array.dtype.str, array.offset, array.shape)
    return array


def received(array: np.ndarray | Mapping) -> np.ndarray:
    """The array that was `sent`."""
    if not isinstance(array, Mapping):
        return array
    filename, dtype, offset, shape = array
    return np.memmap(filename, dtype, "r", offset, shape)


@dataclasses.dataclass(frozen=True)
class About:
    """What goes with pixels."""

    fingerprint: str
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    channels: int | None = None
    """3 for grey images too; None: as many as the pixels have."""
    flip: bool = False
    """Half of the images, by their seeds, from left to right."""
    skipped: int = 0
    vocabulary: Vocabulary | None = None


class _Stored(Images):
    """What both kinds have: pixels of an index, then values, channels and flip."""

    partly: bool = False
    """Whether the fingerprint is of some of the pixels alone, as of many that lie in one array."""

    def all_pixels(self) -> str:
        """Hexadecimal, of all pixels."""
        found = hashlib.blake2b(digest_size=16)
        for first in range(0, len(self.pixels), 4096):
            found.update(np.ascontiguousarray(self.pixels[first : first + 4096]).data)
        return found.hexdigest()

    def __init__(self, pixels: np.ndarray, shape: tuple[int, int, int], about: About) -> None:
        self.pixels = pixels
        self.shape = (about.channels or shape[0], *shape[1:])
        self.labels = about.labels
        self.classes = about.classes
        self.vocabulary = about.vocabulary
        self.flip = about.flip
        self.augmentation = ("flip",) if about.flip else ()
        self.fingerprint = about.fingerprint
        self.skipped = about.skipped

    def __getstate__(self) -> dict[str, Any]:
        """For another process: of a mapped file where it is, not what it holds."""
        return self.__dict__ | {"pixels": sent(self.pixels)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.pixels = received(state["pixels"])

    @abstractmethod
    def _pixels(self, indices: Tensor, seeds: Tensor | None) -> np.ndarray:
        """[B, c, H, W] of memory of its own, uint8 or float32."""

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Bytes as `pixels.from_bytes`; float32 stays."""
        check_indices(indices, seeds, len(self))
        pixels = self._pixels(indices, seeds)
        if self.flip and seeds is not None and len(seeds):
            flipped = (uniform_by_address(seeds, streams.AUGMENTATION) < 0.5).numpy()
            pixels[flipped] = pixels[flipped][..., ::-1]
        x0 = torch.from_numpy(pixels)
        if x0.dtype == torch.uint8:
            x0 = from_bytes(x0)
        if x0.shape[1] != self.shape[0]:
            x0 = x0.expand(-1, self.shape[0], -1, -1)
        return x0.contiguous(), None if self.labels is None else self.labels[indices]


class ArrayImages(_Stored):
    """Images of one size: an array [N, c, H, W], uint8 or float32 in [-1, 1], in memory or mapped from a file."""

    def __init__(self, pixels: np.ndarray, about: About) -> None:
        c, h, w = pixels.shape[1:]
        super().__init__(pixels, (c, h, w), about)

    def __len__(self) -> int:
        return len(self.pixels)

    def _pixels(self, indices: Tensor, seeds: Tensor | None) -> np.ndarray:
        return np.asarray(self.pixels[indices.numpy()])


class RaggedImages(_Stored):
    """Images of several shapes, one behind the other in ``pixels``, from which windows of ``size`` are cut.

    ``pixels``: uint8 or float32, one axis. ``shapes``, int64 [N, 3]: c, h, w of each, no side below ``size``. The
    window lies at random by the image's seed, without one in the middle.
    """

    def __init__(self, pixels: np.ndarray, shapes: np.ndarray, size: tuple[int, int], about: About) -> None:
        super().__init__(pixels, (int(shapes[:, 0].max()), *size), about)
        self.augmentation = (*self.augmentation, "crop")
        self.shapes = shapes
        self.offsets = np.concatenate([[0], np.cumsum(shapes.prod(1))])

    def __len__(self) -> int:
        return len(self.shapes)

    def _pixels(self, indices: Tensor, seeds: Tensor | None) -> np.ndarray:
        _, height, width = self.shape
        found = np.empty((len(indices), *self.shape), self.pixels.dtype)
        places = np.full(len(indices), 0.5)
        if seeds is not None and len(seeds):
            places = uniform_by_address(seeds, streams.AUGMENTATION + 1).numpy()
        for row, (i, u) in enumerate(zip(indices.tolist(), places.tolist(), strict=True)):
            c, h, w = self.shapes[i].tolist()
            image = self.pixels[self.offsets[i] : self.offsets[i + 1]].reshape(c, h, w)
            # One side at most is longer than the window: one number places it. In the middle as `Fit` has it.
            top, left = ((room // 2 if seeds is None else int(u * (room + 1))) for room in (h - height, w - width))
            found[row] = image[:, top : top + height, left : left + width]
        return found
