"""One picture, whatever its file has: grey or RGB, upright, of the size that is wanted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from diffkern.extras import need

__all__ = ["Fit", "pillow"]


LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
"""Of red, green and blue (ITU-R BT.601, PIL's)."""


def pillow(module: str = "Image") -> Any:
    """A module of Pillow."""
    return need(f"PIL.{module}", "Pillow", "train")


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a picture becomes an array: upright, grey or RGB, its shorter side of ``size`` pixels, uint8 [c, h, w].

    ``whole`` keeps the longer side, else the middle of it is taken. ``grey``: one channel of all pictures; otherwise
    grey ones have one and others three.
    """

    size: int | None = None
    grey: bool = False
    whole: bool = False

    def __call__(self, picture: Any) -> np.ndarray:
        """Of a picture of PIL, or of an array uint8 [c, h, w] with c = 1 or 3."""
        if isinstance(picture, np.ndarray):
            if self.keeps(*picture.shape):
                return picture
            planes = [pillow().fromarray(np.ascontiguousarray(plane)) for plane in picture]
            picture = planes[0] if len(planes) == 1 else pillow().merge("RGB", planes)
        image = _plain(picture)
        if self.grey and image.mode == "RGB":
            image = image.convert("L")
        if self.size is not None:
            image = self._sized(image, self.size)
        array = np.asarray(image)
        if array.dtype != np.uint8:
            array = np.rint(array).clip(0, 255).astype(np.uint8)
        return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))

    def keeps(self, channels: int, height: int, width: int) -> bool:
        """Whether there is nothing to do."""
        if self.grey and channels != 1:
            return False
        return self.size is None or (min(height, width) == self.size and (self.whole or height == width))

    def floats(self, picture: np.ndarray) -> np.ndarray:
        """The same of an array float32 in [-1, 1]."""
        if self.keeps(*picture.shape):
            return picture
        if self.grey and len(picture) == 3:
            picture = np.tensordot(LUMINANCE, picture, 1)[None]
        if self.size is None:
            return picture
        planes = [np.asarray(self._sized(pillow().fromarray(np.ascontiguousarray(p)), self.size)) for p in picture]
        return np.stack(planes).clip(-1.0, 1.0)

    def _sized(self, image: Any, size: int) -> Any:
        """Antialiased (PIL's bicubic, in integers: the same on every machine), then cut."""
        shorter = min(image.size)
        if shorter != size:
            width, height = (max(size, round(side * size / shorter)) for side in image.size)
            image = image.resize((width, height), pillow().Resampling.BICUBIC)
        if self.whole or image.size == (size, size):
            return image
        left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
        return image.crop((left, top, left + size, top + size))


def _plain(image: Any) -> Any:
    """The picture upright, of mode L, RGB, or F for 16 bits of grey, which become 0 .. 255 before they are rounded.

    What is transparent is laid on white. CMYK, palettes and other colour spaces become RGB. Raises ValueError for
    floating-point pixels, and for integers beyond 16 bits, whose white is not known.
    """
    image = pillow("ImageOps").exif_transpose(image)
    mode = image.mode
    if mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"has integers of {levels.min()} to {levels.max()}, which are no 16 bits")
        return pillow().fromarray((levels / 257.0).astype(np.float32))
    if mode == "F":
        raise ValueError("has floating-point pixels, of which nothing says what is white")
    grey = mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow().new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("L" if grey else "RGB")
