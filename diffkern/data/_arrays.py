"""Images that are arrays already: tensors, .npy and .npz files."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.data._build import Entry, Source
from diffkern.data._captions import as_text

__all__ = ["Arrays", "are_texts", "as_array", "as_labels", "as_texts", "from_file", "joined", "source_of"]


class Arrays:
    """Images [N, c, H, W], uint8 or float32 in [-1, 1], with labels or captions; of a file, what tells it from all."""

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        name: str = "source",
        identity: Any = None,
        classes: tuple[str, ...] | None = None,
        texts: Any = None,
    ) -> None:
        self.images = as_array(images, name)
        if are_texts(labels):
            labels, texts = None, labels
        self.labels = None if labels is None else as_labels(labels, len(self.images))
        self.texts = None if texts is None else as_texts(texts, len(self.images))
        self.identity = identity
        self.classes = classes


def as_array(given: Any, name: str = "source") -> np.ndarray:
    """[N, c, H, W], uint8 or float32, of a tensor or an array [N, c, H, W], [N, H, W, c] or [N, H, W] (grey).

    ValueError unless c is 1 or 3, there is an image, and floats lie in [-1, 1] and, as images of [0, 1] would, not all
    above 0.
    """
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    array: np.ndarray = given
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim == 4 and array.shape[1] not in (1, 3) and array.shape[3] in (1, 3):
        array = np.moveaxis(array, 3, 1)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"{name} must be images [N, C, H, W] or [N, H, W, C] with C = 1 or 3, or [N, H, W], got shape "
            f"{list(given.shape)}"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} must be uint8, or floating-point numbers in [-1, 1], got {array.dtype}")
    array = array.astype(np.float32, copy=False)
    low, high = float(array.min()), float(array.max())
    if not (low >= -1.0 and high <= 1.0):
        raise ValueError(
            f"{name} must lie in [-1, 1] where it is floating-point, got numbers of {low:.4g} to {high:.4g}"
        )
    if low >= 0.0 and high > 0.0:
        raise ValueError(
            f"{name} must lie in [-1, 1] where it is floating-point, got {low:.4g} to {high:.4g} as of images in "
            "[0, 1]: give 2 x - 1"
        )
    return array


def as_labels(given: Any, count: int, name: str = "labels") -> Tensor:
    """int64 [N] of integers of at least 0: a tensor, an array or a list."""
    found = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if found.is_floating_point() or found.dtype == torch.bool or list(found.shape) != [count]:
        raise ValueError(f"{name} must be integers [{count}], one an image, got {found.dtype} {list(found.shape)}")
    found = found.detach().to("cpu", torch.int64)
    if count and int(found.min()) < 0:
        raise ValueError(f"{name} must be at least 0, got {int(found.min())}")
    return found


def are_texts(given: Any) -> bool:
    """Whether labels are captions: a list or an array of texts."""
    if isinstance(given, np.ndarray):
        return given.dtype.kind == "U"
    return isinstance(given, list | tuple) and len(given) > 0 and all(isinstance(text, str) for text in given)


def as_texts(given: Any, count: int) -> list[str]:
    """So many captions, each on one line."""
    if len(given) != count:
        raise ValueError(f"labels must be captions [{count}], one an image, got {len(given)}")
    return [as_text(str(text), "labels") for text in given]


def from_file(path: Path) -> Arrays:
    """A .npy of images, mapped, or a .npz of images and perhaps labels or captions.

    Of a .npz the images are what is called images, or else its one array of images; the labels what is called labels,
    or else its one vector of as many integers; the captions what is called texts, or else its one vector of as many
    texts.
    """
    state = path.stat()
    identity = [path.name, state.st_size, state.st_mtime_ns]
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.ndarray):
            with found as file:
                found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"source must be a file of NumPy, got {path} ({' '.join(str(error).split())})") from error
    if isinstance(found, np.ndarray):
        return Arrays(found, None, str(path), identity)
    images = _one(found, ("images", "image", "x"), lambda a: a.ndim >= 3)
    if images is None:
        raise ValueError(
            f"source must have one array of images or one that is called images, got {path} with "
            f"{', '.join(f'{name} {list(a.shape)}' for name, a in found.items()) or 'none'}"
        )
    count = len(found[images])
    labels = _one(found, ("labels", "label", "y"), lambda a: a.shape == (count,) and a.dtype.kind in "iu")
    texts = _one(found, ("texts", "captions", "text"), lambda a: a.shape == (count,) and a.dtype.kind == "U")
    own, told = (None if name is None else found[name] for name in (labels, texts))
    return Arrays(found[images], own, str(path), identity, texts=told)


def joined(parts: list[Arrays]) -> Arrays:
    """One behind the other, labels where all have them."""
    shapes = sorted({(part.images.shape[1:], part.images.dtype.str) for part in parts})
    if len(shapes) > 1:
        raise ValueError(f"source must have files of one shape and dtype, got {shapes[0]} and {shapes[1]}")
    labels = [part.labels for part in parts if part.labels is not None]
    own = torch.cat(labels) if len(labels) == len(parts) else None
    identity = [part.identity for part in parts]
    told = [part.texts for part in parts if part.texts is not None]
    texts = list(itertools.chain(*told)) if len(told) == len(parts) else None
    return Arrays(np.concatenate([part.images for part in parts]), own, identity=identity, texts=texts)


def _one(arrays: Mapping[str, np.ndarray], called: Sequence[str], fits: Callable[[np.ndarray], bool]) -> str | None:
    found = [name for name, array in arrays.items() if fits(array)]
    named = [name for name in called if name in found]
    return named[0] if named else found[0] if len(found) == 1 else None


def source_of(arrays: Arrays) -> Source:
    """uint8 images one by one, for `build`."""
    labels, texts = arrays.labels, arrays.texts
    images = arrays.images

    def entries() -> Iterator[Entry]:
        for i, image in enumerate(images):
            label, text = None if labels is None else int(labels[i]), None if texts is None else texts[i]
            yield Entry(f"image {i}", image.__array__, label, text)

    told = arrays.identity is not None and texts is not None  # kept anew, where the cache is from before captions
    return Source(entries(), len(images), arrays.classes, [arrays.identity, "texts"] if told else arrays.identity)
