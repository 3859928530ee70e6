"""Precision and recall on blocks against brute force, torch-fidelity, and sets whose answer is plain."""

from __future__ import annotations

import pytest
import torch
from helpers.lazy import Lazy, needs
from torch import Tensor

from diffkern.metrics import nearest, precision_recall, precision_recall_by_class

fidelity = Lazy("torch_fidelity")


def sets(n: int, m: int, dims: int = 3) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, dims, generator=random), 0.8 * torch.randn(m, dims, generator=random) + 0.4


def covered(points: Tensor, around: Tensor, k: int) -> float:
    """The share of points in a ball around any other, one distance after the other."""
    inside = 0
    radii = [sorted(float((a - b).norm()) for j, b in enumerate(around) if j != i)[k - 1] for i, a in enumerate(around)]
    for p in points:
        inside += any(float((p - a).norm()) <= r for a, r in zip(around, radii, strict=True))
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_blocks_give_what_brute_force_gives(k: int) -> None:
    real, fake = (x.double() for x in sets(23, 17))
    for block in (4, 64):
        found = precision_recall(real, fake, k, block=block)
        assert found == (covered(fake, real, k), covered(real, fake, k))


@needs("torch_fidelity")
def test_they_are_torch_fidelitys() -> None:
    real, fake = sets(300, 260)
    expected = fidelity.metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
    assert precision_recall(real, fake) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_a_set_far_away_has_neither_and_the_same_set_has_both() -> None:
    real, _ = sets(20, 1)
    assert precision_recall(real, real + 100.0) == (0.0, 0.0)
    assert precision_recall(real, real) == (1.0, 1.0)


def test_one_image_repeated_is_precise_and_reaches_little() -> None:
    """Its copies have balls of radius 0: what is reached is the one real image that they copy, also far from 0."""
    real = sets(40, 1, 50)[0] + 30.0
    found = precision_recall(real, real[:1].repeat(40, 1), block=16)
    assert found == (1.0, 1 / 40)


def test_every_class_is_measured_by_itself() -> None:
    real, fake = sets(30, 30)
    labels = torch.arange(30) % 2
    fake = torch.where(labels[:, None] == 1, fake + 100.0, fake)
    found = precision_recall_by_class(real, labels, fake, labels, classes=3)
    assert found[0] == precision_recall(real[::2], fake[::2])
    assert found[1] == (0.0, 0.0)
    assert found[2] is None


def test_the_nearest_come_first() -> None:
    queries, among = sets(7, 12)
    expected = (queries[:, None] - among).norm(dim=2).argsort(1)[:, :5]
    assert torch.equal(nearest(queries, among, 5, block=4), expected)


def test_bad_input_is_named() -> None:
    real, fake = sets(5, 4)
    with pytest.raises(ValueError, match=r"k must lie in 1..3, as fake has 4 rows, got 4"):
        precision_recall(real, fake, 4)
    with pytest.raises(ValueError, match="fake must have the 3 columns of real, got 2"):
        precision_recall(real, fake[:, :2])
    with pytest.raises(ValueError, match=r"real must be floats \[N, D\], N at least 1"):
        precision_recall(real[:0], fake)
    with pytest.raises(ValueError, match=r"fake_labels must have shape \[4\], got shape \[5\]"):
        precision_recall_by_class(real, torch.zeros(5), fake, torch.zeros(5), 1)
    with pytest.raises(ValueError, match=r"k must lie in 1..5, got 6"):
        nearest(fake, real, 6)
