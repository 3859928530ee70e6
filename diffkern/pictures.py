"""Pictures of images and of curves, with the words a reader needs beside them, as PNG.

Images are drawn with Pillow alone, so the same images give the same bytes of the same file; curves with matplotlib.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern import records, storage
from diffkern.extras import need
from diffkern.pixels import to_bytes

__all__ = ["as_bytes", "check_scale", "class_grid", "default_scale", "grid", "loss_curve", "plain", "tile", "write"]

SCALE = 8  # an image of 8 x 8 becomes a tile of 80 x 80 with its margin
MARGIN = 1  # pixels of background around an image, before enlarging
GAP = 4  # white between the tiles
FONT = 18
LARGEST = 1 << 28  # pixels of a picture
EXTRA = "train"


def default_scale(image_size: int) -> int:
    """How much images of so many pixels are enlarged to be seen well: 8 for 8, 2 for 28, 1 from 64 on."""
    return max(1, min(SCALE, 64 // image_size))


def as_bytes(images: Tensor) -> Tensor:
    """`pixels.to_bytes` of images [..., C, H, W] in [-1, 1], with the channels last and on the CPU: [..., H, W, C]."""
    return to_bytes(images).movedim(-3, -1).contiguous().cpu()


def plain(image: Tensor) -> Any:
    """[C, H, W] in [-1, 1], C = 1 or 3, as a Pillow image, pixel by pixel."""
    pixels = as_bytes(torch.nan_to_num(image.float(), nan=-1.0)).numpy()
    return need("PIL.Image", "Pillow", EXTRA).fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def tile(image: Tensor, scale: int = SCALE, *, ink: bool = False) -> Any:
    """[C, H, W] in [-1, 1], C = 1 or 3, as a Pillow image with a margin, enlarged with a Lanczos filter.

    -1 is black and 1 white; with ``ink`` (one channel) the other way round: dark ink on white.
    """
    pillow = need("PIL.Image", "Pillow", EXTRA)
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must have shape (1, H, W) or (3, H, W), got {tuple(image.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    value = torch.nan_to_num(image.float(), nan=-1.0)
    grey = as_bytes(-value if ink else value).numpy()
    grey = np.pad(grey, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255 if ink else 0)
    size = (grey.shape[1] * scale, grey.shape[0] * scale)
    return pillow.fromarray(grey[..., 0] if grey.shape[2] == 1 else grey).resize(size, pillow.Resampling.LANCZOS)


def check_scale(scale: int, image_size: int, images: int = 1) -> None:
    """ValueError unless a picture of so many square images, enlarged so much, has at most `LARGEST` pixels."""
    most = int((LARGEST / images) ** 0.5 - GAP) // (image_size + 2 * MARGIN)
    if not 1 <= scale <= most:
        raise ValueError(
            f"scale must lie in 1..{most} for a picture of {images} images of {image_size} x {image_size}, got "
            f"{records.shown(scale)}"
        )


def grid(
    rows: Sequence[Tensor],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    title: str = "",
    scale: int = SCALE,
    ink: bool = False,
) -> Any:
    """A Pillow image of `tile`s: `rows` of images [N, C, H, W], `columns` the words above them, `names` the words left
    of the rows."""
    pillow, draw_module, font_module = (
        need(f"PIL.{name}", "Pillow", EXTRA) for name in ("Image", "ImageDraw", "ImageFont")
    )
    font = font_module.load_default(size=FONT)
    tiles = [[tile(image, scale, ink=ink) for image in row] for row in rows]
    if not tiles or not tiles[0]:
        raise ValueError("rows must hold at least one image, got none")
    width, height = tiles[0][0].size
    across = max(len(row) for row in tiles)
    left = max((int(font.getlength(name)) for name in names), default=-2 * GAP) + 3 * GAP
    top = GAP + (FONT + 3 * GAP if title else 0) + (FONT + 2 * GAP if columns else 0)
    wide = max(left + across * (width + GAP), int(font.getlength(title)) + 3 * GAP)
    canvas = pillow.new(tiles[0][0].mode, (wide, top + len(tiles) * (height + GAP)), "white")
    draw = draw_module.Draw(canvas)
    if title:
        draw.text((left, 2 * GAP), title, fill="black", font=font)
    for c, word in enumerate(columns):
        draw.text((left + c * (width + GAP) + width // 2, top - GAP), word, fill="#5a5a5a", font=font, anchor="ms")
    for r, row in enumerate(tiles):
        y = top + r * (height + GAP)
        if r < len(names):
            draw.text((left - 2 * GAP, y + height // 2), names[r], fill="#5a5a5a", font=font, anchor="rm")
        for c, picture in enumerate(row):
            canvas.paste(picture, (left + c * (width + GAP), y))
    return canvas


def write(picture: Any, path: str | os.PathLike[str]) -> None:
    """The picture as PNG, its folder made if needed; no date goes in, so equal pictures are equal files."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    _store(path, data)


def _store(path: str | os.PathLike[str], data: io.BytesIO) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, data.getvalue())


def class_grid(
    images: Tensor, classes: Tensor, title: str = "", *, columns: int = 10, scale: int = SCALE, ink: bool = False
) -> Any:
    """Images [N, C, H, W] row by row; a column has its class as heading where all images of it share one."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    asked = [classes[c::columns].unique().tolist() for c in range(min(columns, len(classes)))]
    headings = [str(found[0]) for found in asked] if all(len(found) == 1 for found in asked) else []
    return grid(rows, headings, title=title, scale=scale, ink=ink)


def loss_curve(
    values: Sequence[float],
    path: str | os.PathLike[str],
    window: int = 50,
    *,
    iterations: Sequence[int] | None = None,
    what: str = "mean |eps - prediction|²",
    beside: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None,
) -> None:
    """The training loss and its running mean over `window` values, as PNG; the axis is logarithmic where all are > 0.

    ``iterations``: where each value stands, 0, 1, ... if None; ``what`` the loss is, for the axis. ``beside``: other
    curves by their names, (iterations, values) each.
    """
    need("matplotlib", "matplotlib", EXTRA).use("Agg")
    plot = need("matplotlib.pyplot", "matplotlib", EXTRA)
    at = np.arange(len(values)) if iterations is None else np.asarray(iterations)
    window = max(1, min(window, len(values) // 4))
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values)]))
    smooth = (sums[window:] - sums[:-window]) / window
    figure, axes = plot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(at, values, color="0.8", linewidth=0.8, label="loss")
    middle = (at[window - 1 :] + at[: len(smooth)]) / 2
    axes.plot(middle, smooth, color="C0", linewidth=2, label=f"mean of {window}")
    every = [*values]
    for name, (places, numbers) in (beside or {}).items():
        axes.plot(places, numbers, linewidth=1, label=name)
        every += numbers
    if min(every) > 0.0:
        axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel(f"loss: {what}")
    axes.set_title(f"Training loss, {smooth[-1]:.4f} at the end")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data)
    plot.close(figure)
    _store(path, data)
