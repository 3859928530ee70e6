"""The order of examples, their seeds, and the part kept for validation."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from diffkern import ops
from diffkern.data import Images, Stream, Subset, example_seeds, open_images, split

BITS = (1 << 64) - 1


def mix(z: int) -> int:
    """splitmix64's finaliser, on unsigned integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS
    return z ^ z >> 31


def seed_of(job: int, sample: int) -> int:
    """`ops.seeds` by its formula, signed."""
    z = mix(mix(job + 0x9E3779B97F4A7C15 & BITS) ^ mix(sample + 0xD1B54A32D192ED03 & BITS))
    return z - (1 << 64) if z >> 63 else z


@pytest.mark.parametrize("count", [1, 2, 13])
def test_every_epoch_has_every_example_once_wherever_it_is_read_from(count: int) -> None:
    stream = Stream(count, seed=5)
    whole = stream.indices(0, 4 * count)
    for epoch in range(4):
        assert sorted(whole[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    for first in range(0, 3 * count):
        assert torch.equal(Stream(count, seed=5).indices(first, count), whole[first : first + count])
    assert stream.indices(7, 0).tolist() == []
    assert stream.indices(0, 1).dtype == torch.int64


def test_the_order_is_that_of_the_seeds_of_the_epoch() -> None:
    """The formula in Python's integers, which have no width."""
    order = []
    for epoch in (0, 1, 2):
        key = seed_of(5, (1 << 62) + epoch)
        order += sorted(range(13), key=lambda i, key=key: seed_of(key & BITS, i))
    assert Stream(13, seed=5).indices(0, 39).tolist() == order


def test_epochs_and_seeds_differ_and_an_unshuffled_stream_counts() -> None:
    first, second = Stream(50, 0).indices(0, 100).split(50)
    assert not torch.equal(first, second)
    assert not torch.equal(first, Stream(50, 1).indices(0, 50))
    assert Stream(5, 0, shuffle=False).indices(3, 9).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


def test_every_order_is_as_likely_as_any_other() -> None:
    """3! orders over 600 epochs: chi-square of 5 degrees, whose 0.9999 quantile is 25.7."""
    epochs = Stream(3, seed=2).indices(0, 1800).reshape(600, 3).tolist()
    found = Counter(map(tuple, epochs))
    assert len(found) == 6
    assert sum((n - 100) ** 2 / 100 for n in found.values()) < 25.7


def test_the_seeds_of_examples_are_those_of_their_positions() -> None:
    seeds = example_seeds(9, 0, 100)
    assert torch.equal(seeds, ops.seeds(9, 100))
    assert torch.equal(example_seeds(9, 40, 60), seeds[40:])
    assert seeds[:2].tolist() == [seed_of(9, 0), seed_of(9, 1)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Stream(0), "count must be an integer of at least 1, got 0"),
        (lambda: Stream(3, 1.5), "seed must be an integer of 64 bits, got 1.5"),  # type: ignore[arg-type]
        (lambda: Stream(3).indices(-1, 2), r"first must be an integer in 0\.\.\d+, got -1"),
        (lambda: Stream(3).indices(0, -2), "n must be an integer of at least 0, got -2"),
    ],
)
def test_a_stream_says_what_is_wrong(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make()  # type: ignore[operator]


# ------------------------------------------------------------------------------------------------------------- split


def numbered(count: int, labels: bool = True) -> Images:
    """Images of 1 x 1 whose grey value is their number."""
    pixels = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    return open_images(pixels, labels=torch.arange(count) % 3 if labels else None)


def numbers(images: Images) -> list[int]:
    """The numbers of all images, by what `batch` returns."""
    return ((images.batch(torch.arange(len(images)))[0][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize(("validation", "count"), [(7, 7), (0.25, 10), (0.001, 1)])
def test_a_split_is_the_whole_in_two_parts(validation: float, count: int) -> None:
    training, kept = split(numbered(40), validation)
    assert len(kept) == count
    assert sorted(numbers(training) + numbers(kept)) == list(range(40))
    assert numbers(kept) == sorted(numbers(kept))
    assert kept.labels is not None
    assert kept.labels.tolist() == [i % 3 for i in numbers(kept)]
    assert kept.classes == training.classes == ("0", "1", "2")
    x0, labels = kept.batch(torch.tensor([0]))
    assert labels is not None
    assert int(labels) == numbers(kept)[0] % 3
    assert x0.shape == (1, 1, 1, 1)


def test_a_split_depends_on_seed_and_indices_alone() -> None:
    kept = numbers(split(numbered(40), 10, seed=1)[1])
    assert kept == numbers(split(numbered(40), 10, seed=1)[1])
    assert kept != numbers(split(numbered(40), 10, seed=2)[1])
    # One image more: of those kept, only the last in the order of addresses may have gone for it.
    assert len(set(kept) - set(numbers(split(numbered(41), 10, seed=1)[1]))) <= 1


def test_parts_and_wholes_have_fingerprints_of_their_own() -> None:
    whole = numbered(40)
    parts = [whole, *split(whole, 10), *split(whole, 10, seed=1), numbered(41), numbered(40, labels=False)]
    assert len({part.fingerprint for part in parts}) == len(parts)
    assert whole.fingerprint == numbered(40).fingerprint


@pytest.mark.parametrize(
    ("validation", "sentence"),
    [
        (0, "validation must leave images on both sides of 4, got 0"),
        (4, "validation must leave images on both sides of 4, got 4"),
        (0.9, "validation must leave images on both sides of 4, got 0.9"),
        (1.5, r"validation must be a number of images or a share in \(0, 1\), got 1.5"),
        ("all", r"validation must be a number of images or a share in \(0, 1\), got 'all'"),
    ],
)
def test_a_split_with_an_empty_side_is_refused(validation: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        split(numbered(4), validation)


def test_a_subset_refuses_indices_that_the_whole_has_not() -> None:
    whole = numbered(4)
    with pytest.raises(ValueError, match=r"^indices must lie in 0\.\.3, got -1$"):
        Subset(whole, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match=r"^indices must lie in 0\.\.1, got 2$"):
        Subset(whole, torch.tensor([3, 0])).batch(torch.tensor([2]))
    with pytest.raises(ValueError, match=r"^indices must be int64 \[B\], got torch.int32 \[1\]$"):
        whole.batch(torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^seeds must be int64 \[2\], got torch.int64 \[3\]$"):
        whole.batch(torch.tensor([0, 1]), torch.arange(3))
