"""One picture of an evaluation: generated images above their nearest training images, and precision and recall a
class."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from diffkern import checks, pictures
from diffkern.extras import need
from diffkern.metrics.classifier import Labelled
from diffkern.metrics.evaluation import Scores
from diffkern.metrics.features import Extractor
from diffkern.metrics.neighbours import nearest
from diffkern.metrics.statistics import Statistics

__all__ = ["neighbour_grid", "picture"]

MOST_CLASSES = 40
"""Bars that can be read; of more classes those with the lowest recall are shown."""


def neighbour_grid(
    images: Tensor,
    reference: Labelled,
    statistics: Statistics,
    extractor: Extractor,
    *,
    k: int = 3,
    title: str = "",
    ink: bool = False,
) -> Any:
    """A Pillow image: a column for each of ``images`` [N, C, H, W], the ``k`` nearest of the ``reference`` below it.

    Nearest by the features of the ``extractor``; ``statistics`` are the reference's (`reference_statistics`). What was
    learnt by heart stands above itself. ``ink``: one channel as dark ink on white.
    """
    if statistics.count != len(reference) or statistics.extractor != extractor.name:
        raise ValueError(
            f"statistics must be those of the {len(reference)} reference images by {extractor.name!r}, got "
            f"{statistics.count} by {statistics.extractor!r}"
        )
    checks.need_tensor("images", images)
    found = nearest(extractor(images).pooled.cpu(), statistics.features, min(k, len(reference)))
    below = [reference.batch(column)[0] for column in found.T]
    names = ["generated", "nearest", *(f"{i}. nearest" for i in range(2, len(below) + 1))]
    scale = pictures.default_scale(max(images.shape[-2:]))
    return pictures.grid([images.cpu(), *below], names=names, title=title, scale=scale, ink=ink)


def picture(scores: Scores, grid: Any) -> Any:
    """The ``grid`` of `neighbour_grid` with bars of precision and recall below it, of each class or of all; write it
    with `diffkern.pictures.write`."""
    pillow = need("PIL.Image", "Pillow", "evaluate")
    bars = _bars(scores, max(480, grid.width))
    whole = pillow.new("RGB", (max(grid.width, bars.width), grid.height + bars.height), "white")
    whole.paste(grid, (0, 0))
    whole.paste(bars, (0, grid.height))
    return whole


def _bars(scores: Scores, width: int) -> Any:
    need("matplotlib", "matplotlib", "evaluate").use("Agg")
    plot = need("matplotlib.pyplot", "matplotlib", "evaluate")
    shown = [
        (c.name, c.precision, c.recall) for c in scores.classes if c.precision is not None and c.recall is not None
    ]
    shown = sorted(shown, key=lambda c: c[2] or 0.0)[:MOST_CLASSES] if len(shown) > MOST_CLASSES else shown
    rows = [*shown, ("all", scores.precision, scores.recall)]
    long = max(len(row[0]) for row in rows) * len(rows) > width / 9
    figure, axes = plot.subplots(figsize=(width / 100, 3.8 if long else 2.8), dpi=100)
    places = torch.arange(len(rows)).numpy()
    axes.bar(places - 0.2, [row[1] for row in rows], 0.38, color="C0", label="precision")
    axes.bar(places + 0.2, [row[2] for row in rows], 0.38, color="C1", label="recall")
    axes.set_xticks(places, [row[0] for row in rows], rotation=60 if long else 0, ha="right" if long else "center")
    axes.set_ylim(0.0, 1.0)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    axes.set_title(f"FID {scores.fid:.3g}, {scores.images} images against {scores.reference}", fontsize=10, loc="left")
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, format="png")
    plot.close(figure)
    return need("PIL.Image", "Pillow", "evaluate").open(data).convert("RGB")
