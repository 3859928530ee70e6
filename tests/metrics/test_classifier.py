"""The classifier that is trained on the data themselves: two classes of bars that it learns in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.lazy import needs
from torch import Tensor

from diffkern.metrics import Classifier, Extractor, agreement, quantised, train_classifier

pytestmark = needs("safetensors")


class Bars:
    """Images [1, side, side] of one bright row (class 0) or column (class 1) in noise."""

    def __init__(self, n: int, side: int = 8, labelled: bool = True) -> None:
        random = torch.Generator().manual_seed(0)
        self.images = torch.rand(n, 1, side, side, generator=random) - 1.0
        at = torch.randint(1, side - 1, (n,), generator=random)
        labels = torch.arange(n) % 2
        for i in range(n):
            self.images[i, 0].select(int(labels[i]), int(at[i])).fill_(1.0)
        self.labels = labels if labelled else None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images[indices], None if self.labels is None else self.labels[indices]


@pytest.fixture(scope="module")
def bars() -> Bars:
    return Bars(80)


@pytest.fixture(scope="module")
def classifier(bars: Bars) -> Classifier:
    return train_classifier(bars, steps=40)


def test_it_learns_and_says_how_well(bars: Bars, classifier: Classifier) -> None:
    found = classifier(bars.images)
    assert isinstance(classifier, Extractor)
    assert found.logits is not None
    assert found.spatial is not None
    assert agreement(found.logits, bars.labels) > 0.95
    assert classifier.accuracy >= 0.75
    assert found.pooled.shape == (80, classifier.dims)
    assert found.spatial.shape == (80, 7 * 4 * 4)
    assert not found.pooled.requires_grad


def test_its_features_are_standard_over_the_images_that_it_learnt_from(bars: Bars, classifier: Classifier) -> None:
    """All but a tenth of these, which is why the numbers are not exact."""
    pooled = classifier(bars.images).pooled
    assert pooled.mean(0).abs().max() < 0.2
    assert pooled.var(0).mean() == pytest.approx(1.0, rel=0.1)


def test_the_same_images_and_seed_give_the_same_bits(bars: Bars) -> None:
    state = torch.get_rng_state()
    one, two, other = (train_classifier(bars, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one(bars.images).pooled, two(bars.images).pooled)
    assert one.name == two.name != other.name
    assert torch.equal(torch.get_rng_state(), state)


def test_a_file_gives_back_the_classifier(bars: Bars, classifier: Classifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "judge")
    again = Classifier.load(tmp_path / "judge")
    assert (again.name, again.dims, again.accuracy) == (classifier.name, 64, classifier.accuracy)
    assert torch.equal(again(bars.images).pooled, classifier(bars.images).pooled)
    text = json.loads((tmp_path / "judge.json").read_text())
    (tmp_path / "judge.json").write_text(json.dumps(text | {"classes": 3}))
    with pytest.raises(ValueError, match=r"judge.safetensors must hold the weights that .*size mismatch for head"):
        Classifier.load(tmp_path / "judge")
    with pytest.raises(FileNotFoundError, match=r"there is no classifier .*other\.safetensors"):
        Classifier.load(tmp_path / "other")


@pytest.mark.parametrize("side", [7, 28, 33])
def test_images_of_any_size_and_colours_go_through(side: int) -> None:
    class Coloured(Bars):
        def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
            images, labels = super().batch(indices)
            return images.expand(-1, 3, -1, -1), labels

    found = train_classifier(Coloured(20, side), steps=1)(torch.zeros(2, 3, side, side))
    assert found.pooled.shape == (2, 64)


def test_an_image_and_its_png_have_the_same_features(bars: Bars, classifier: Classifier) -> None:
    stored = quantised(bars.images)
    assert torch.equal(classifier(stored.float() / 127.5 - 1.0).pooled, classifier(bars.images).pooled)
    assert torch.equal(
        quantised(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)).flatten(),
        torch.tensor([0, 0, 128, 255, 255]),
    )


def test_bad_input_is_named(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="images must have labels for a classifier, got none"):
        train_classifier(Bars(20, labelled=False))
    with pytest.raises(ValueError, match="at least 20, of at least 2 classes, got 10 of 2"):
        train_classifier(Bars(10))
    with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\), got 1"):
        train_classifier(Bars(20), held_out=1)
    with pytest.raises(ValueError, match=r"shape \[B, 1, 8, 8\], as those .*, got \[2, 1, 9, 9\]"):
        classifier(torch.zeros(2, 1, 9, 9))
    with pytest.raises(ValueError, match=r"images must be finite, got NaN or infinity in images\[1\]"):
        quantised(torch.tensor([0.0, float("inf")]).view(2, 1, 1, 1))
    with pytest.raises(
        ValueError,
        match=r"images must be floats \[B, C, H, W\] in \[-1, 1\], got uint8 of .*: images / 127.5 - 1 makes",
    ):
        quantised(torch.zeros(1, 1, 2, 2, dtype=torch.uint8))
