"""The picture of an evaluation: every image above its nearest, bars a class, the same bytes each time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lazy import needs
from helpers.metric_cases import Corners, Drawn

from diffkern import pictures
from diffkern.metrics import ClassScores, Scores, Statistics, evaluate, neighbour_grid, picture, reference_statistics

pytestmark = needs("PIL", "matplotlib", "safetensors", "torch_fidelity")

REAL = Drawn(20)


@pytest.fixture(scope="module")
def scores() -> Scores:
    return evaluate(Drawn(16, seed=1), REAL, Corners())


def test_what_was_learnt_by_heart_stands_above_itself() -> None:
    chosen = torch.tensor([3, 8, 0])
    known = reference_statistics(REAL, Corners())
    found = neighbour_grid(REAL.images[chosen], REAL, known, Corners(), k=2)
    below = [REAL.images[chosen]]
    distances = torch.cdist(Corners()(REAL.images).pooled[chosen], Corners()(REAL.images).pooled)
    second = distances.argsort(1)[:, 1]
    expected = pictures.grid(
        [*below, REAL.images[chosen], REAL.images[second]],
        names=["generated", "nearest", "2. nearest"],
        scale=pictures.default_scale(4),
    )
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_the_picture_has_the_grid_above_and_bars_below(scores: Scores, tmp_path: Path) -> None:
    grid = neighbour_grid(REAL.images[:3], REAL, reference_statistics(REAL, Corners()), Corners(), title="digits")
    found = picture(scores, grid)
    assert np.array_equal(np.asarray(found)[: grid.height, : grid.width], np.asarray(grid.convert("RGB")))
    bars = np.asarray(found)[grid.height :].reshape(-1, 3)
    assert {(31, 119, 180), (255, 127, 14)} <= {tuple(c) for c in np.unique(bars, axis=0).tolist()}
    pictures.write(found, tmp_path / "evaluation.png")
    pictures.write(picture(scores, grid), tmp_path / "again.png")
    assert (tmp_path / "evaluation.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.full
def test_of_many_classes_those_of_the_lowest_recall_are_shown(scores: Scores) -> None:
    grid = neighbour_grid(REAL.images[:1], REAL, reference_statistics(REAL, Corners()), Corners())
    low = tuple(ClassScores(f"low {i}", 9, 0.5, 0.1, None) for i in range(40))
    high = tuple(ClassScores(f"high {i}", 9, 0.5, 0.9, None) for i in range(3))
    few, many = (picture(dataclasses.replace(scores, classes=c), grid) for c in (low, (*high, *low)))
    assert np.array_equal(np.asarray(few), np.asarray(many))


def test_statistics_of_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="statistics must be those of the 20 reference images by 'corners@0', got 0"):
        neighbour_grid(REAL.images, REAL, Statistics("corners@0", keep=True), Corners())
