"""Data sets of other libraries: torchvision's (anything that is indexed) and Hugging Face's `datasets`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from diffkern.data._build import Entry, Source
from diffkern.data._captions import as_text
from diffkern.data._pixels import pillow
from diffkern.integers import as_integer

__all__ = ["is_dataset", "source_of"]


def is_dataset(value: Any) -> bool:
    """Whether it has a length and items."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | Mapping)


def source_of(dataset: Any, numbers: list[int], labels: bool | str) -> Source:
    """The pictures of a data set at these ``numbers``.

    Of `datasets`: the column of its type Image, and as labels the one that is called ``labels`` (captions where it has
    texts), or else its only ClassLabel. Of others: items (picture, label, ...), pictures, or mappings with "image" and
    "label"; labels where they are integers, ``dataset.classes`` their names. With ``labels="text"`` captions: of items
    the second, of mappings "text".
    """
    if hasattr(dataset, "features") and hasattr(dataset, "column_names"):
        return _of_columns(dataset, numbers, labels)
    names = getattr(dataset, "classes", None)
    classes = tuple(names) if labels is not False and names and all(isinstance(name, str) for name in names) else None
    return Source(_items(dataset, numbers, labels), len(numbers), classes, None)


def _of_columns(dataset: Any, numbers: list[int], wanted: bool | str) -> Source:
    kinds = {name: type(feature).__name__ for name, feature in dataset.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    if len(pictures) != 1:
        raise ValueError(
            f"source must have one column of images, got {', '.join(pictures) or 'none'} among "
            f"{', '.join(dataset.column_names)}: dataset.select_columns and cast_column make it one"
        )
    named = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    label: str | None = None
    if isinstance(wanted, str):
        if wanted not in kinds:
            raise ValueError(f"labels must be a column of {', '.join(kinds)}, got {wanted!r}")
        label = wanted
    elif wanted and len(named) > 1:
        raise ValueError(f"labels must say which of the columns {', '.join(named)} they are, got {wanted}")
    elif wanted and named:
        label = named[0]
    rows = dataset.select(numbers).with_format(None)
    values = [None] * len(numbers) if label is None else list(rows[label])
    classes = tuple(dataset.features[label].names) if label in named and label is not None else None
    rows = rows.select_columns(pictures)

    def picture(row: int) -> Any:
        return _picture(rows[row][pictures[0]])

    def entries() -> Iterator[Entry]:
        for row, (i, value) in enumerate(zip(numbers, values, strict=True)):
            number, text = (None, as_text(value, f"image {i}")) if isinstance(value, str) else (value, None)
            yield Entry(f"image {i}", functools.partial(picture, row), number, text)

    return Source(entries(), len(numbers), classes, ["datasets", rows._fingerprint, label])


def _items(dataset: Any, numbers: list[int], labelled: bool | str) -> Iterator[Entry]:
    for i in numbers:
        try:
            item = dataset[i]
        except Exception as error:  # an image that cannot be read is read by the data set itself
            yield Entry(f"image {i}", functools.partial(_raise, error), None)
            continue
        picture, label = _parts(item, "text" if labelled == "text" else "label")
        loaded = functools.partial(_same, _picture(picture, i))  # a wrong kind is said of the first
        if labelled == "text":
            yield Entry(f"image {i}", loaded, None, as_text(label, f"image {i}") if isinstance(label, str) else None)
        else:
            yield Entry(f"image {i}", loaded, as_integer(label) if labelled else None)


def _parts(item: Any, second: str) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        return item.get("image"), item.get(second)
    if isinstance(item, tuple | list):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _picture(value: Any, i: int = 0) -> Any:
    """A picture of PIL as it is, uint8 [c, h, w], [h, w, c] or [h, w] as [c, h, w]; ValueError for anything else."""
    if isinstance(value, pillow().Image):
        return value
    array = value.numpy() if isinstance(value, Tensor) else value
    if isinstance(array, np.ndarray) and array.dtype == np.uint8:
        if array.ndim == 2:
            return array[None]
        if array.ndim == 3 and 1 in (array.shape[0] in (1, 3), array.shape[2] in (1, 3)):
            return array if array.shape[0] in (1, 3) else array.transpose(2, 0, 1)
    found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(value).__name__
    raise ValueError(
        f"source must have pictures of PIL or uint8 arrays, got {found} at {i}: leave out what makes tensors of them, "
        "of which nothing says whether they lie in [0, 1] or [-1, 1]"
    )


def _same(picture: Any) -> Any:
    return picture


def _raise(error: Exception) -> None:
    raise error
