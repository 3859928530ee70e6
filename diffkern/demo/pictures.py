"""The pictures of the demo: dark ink on white, enlarged smoothly, with the words a reader needs beside them.

Everything but the curves is drawn with Pillow alone, so the same images give the same bytes of the same file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern import ops, records, storage, streams
from diffkern.demo import need
from diffkern.names import Prediction
from diffkern.nn import UNet
from diffkern.plan import Plan
from diffkern.sampling.runner import initial, sample
from diffkern.schedules.discrete import DiscreteSchedule

SCALE = 8  # an image of 8 x 8 becomes a tile of 80 x 80 with its margin
MARGIN = 1  # pixels of background around an image, before enlarging
GAP = 4  # white between the tiles
FONT = 18
LARGEST = 1 << 28  # pixels of a picture


def tile(image: Tensor, scale: int = SCALE) -> Any:
    """[1, H, W] in [-1, 1] as a grey Pillow image, -1 white and 1 black, with a margin, enlarged with a Lanczos
    filter."""
    pillow = need("PIL.Image", "Pillow")
    if image.dim() != 3 or image.shape[0] != 1:
        raise ValueError(f"image must have shape (1, H, W), got {tuple(image.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    ink = torch.nan_to_num(image[0].float()).clamp(-1.0, 1.0)
    grey = ((1.0 - ink) * 127.5).round().to(torch.uint8).numpy()
    grey = np.pad(grey, MARGIN, constant_values=255)
    size = (grey.shape[1] * scale, grey.shape[0] * scale)
    return pillow.fromarray(grey).resize(size, pillow.Resampling.LANCZOS)


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
) -> Any:
    """A Pillow image of tiles: `rows` of images [N, 1, H, W], `columns` the words above them, `names` the words left
    of the rows."""
    pillow, draw_module, font_module = (need(f"PIL.{name}", "Pillow") for name in ("Image", "ImageDraw", "ImageFont"))
    font = font_module.load_default(size=FONT)
    tiles = [[tile(image, scale) for image in row] for row in rows]
    if not tiles or not tiles[0]:
        raise ValueError("rows must hold at least one image, got none")
    width, height = tiles[0][0].size
    across = max(len(row) for row in tiles)
    left = max((int(font.getlength(name)) for name in names), default=-2 * GAP) + 3 * GAP
    top = GAP + (FONT + 3 * GAP if title else 0) + (FONT + 2 * GAP if columns else 0)
    wide = max(left + across * (width + GAP), int(font.getlength(title)) + 3 * GAP)
    canvas = pillow.new("L", (wide, top + len(tiles) * (height + GAP)), 255)
    draw = draw_module.Draw(canvas)
    if title:
        draw.text((left, 2 * GAP), title, fill=0, font=font)
    for c, word in enumerate(columns):
        draw.text((left + c * (width + GAP) + width // 2, top - GAP), word, fill=90, font=font, anchor="ms")
    for r, row in enumerate(tiles):
        y = top + r * (height + GAP)
        if r < len(names):
            draw.text((left - 2 * GAP, y + height // 2), names[r], fill=90, font=font, anchor="rm")
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


def class_grid(images: Tensor, classes: Tensor, title: str = "", *, columns: int = 10, scale: int = SCALE) -> Any:
    """Images [N, 1, H, W] row by row; a column has its class as heading where all images of it share one."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    asked = [classes[c::columns].unique().tolist() for c in range(min(columns, len(classes)))]
    headings = [str(found[0]) for found in asked] if all(len(found) == 1 for found in asked) else []
    return grid(rows, headings, title=title, scale=scale)


def forward_strip(
    images: Tensor, schedule: DiscreteSchedule, prediction: Prediction, *, columns: int = 11, seed: int = 0
) -> Any:
    """The forward process: a row an image, from clean data to noise, every column q(x_t | x_0) with the same eps
    (lecture 000)."""
    last = schedule.T - 1
    times = [round(last * c / (columns - 1)) for c in range(columns)]
    table, seeds = schedule.table(prediction), ops.seeds(seed, len(images))
    noised = [ops.noising(images, table, torch.tensor(t), seeds=seeds, stream=streams.TRAINING)[0] for t in times]
    headings = [f"t={t}" for t in times]
    title = f"Forward process, {schedule.name} schedule: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps"
    return grid(list(torch.stack(noised, dim=1)), headings, title=title)


def trajectory_strip(
    model: UNet, plan: Plan, classes: Tensor, *, guidance: float, columns: int = 11, seed: int = 0
) -> Any:
    """The states of a sampler from noise to digits: a row a class, a column every few steps."""
    device = next(model.parameters()).device
    config = model.config
    seeds, cond = ops.seeds(seed, len(classes)).to(device), classes.to(device)
    x = initial(plan, (len(classes), *config.shape), seeds, device=device)
    none = torch.full_like(cond, model.null_class)
    run = sample(model, x, plan, seeds=seeds, cond=cond, uncond=none, guidance=guidance, trajectory=True)
    assert run.trajectory is not None
    states = run.trajectory.cpu()
    shown = [round((len(states) - 1) * c / (columns - 1)) for c in range(columns)]
    title = f"{plan.name}, {len(states) - 1} steps: the state after so many steps"
    rows = list(states[shown].transpose(0, 1))
    return grid(rows, [str(i) for i in shown], [str(c) for c in classes.tolist()], title=title)


def loss_curve(values: Sequence[float], path: str | os.PathLike[str], window: int = 50) -> None:
    """The training loss of each iteration and its running mean over `window` of them, on a logarithmic axis, as PNG."""
    need("matplotlib", "matplotlib").use("Agg")
    plot = need("matplotlib.pyplot", "matplotlib")
    window = max(1, min(window, len(values) // 4))
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(values)]))
    smooth = (sums[window:] - sums[:-window]) / window
    figure, axes = plot.subplots(figsize=(8, 4.5), dpi=120)
    axes.plot(values, color="0.8", linewidth=0.8, label="each iteration")
    axes.plot(np.arange(len(smooth)) + (window - 1) / 2, smooth, color="C0", linewidth=2, label=f"mean of {window}")
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss: mean |eps - prediction|²")
    axes.set_title(f"Training loss, {smooth[-1]:.4f} at the end")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data)
    plot.close(figure)
    _store(path, data)
