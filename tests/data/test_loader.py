"""Batches of a run: the same examples for every number of processes, workers and micro-batches."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern.data import Batch, Images, Stream, example_seeds, loader, open_images, split

SEED = 11


def pictures(count: int = 13) -> Images:
    """Wide random images, cut and flipped at random, with labels."""
    values = torch.randint(0, 256, (count, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return open_images((values, torch.arange(count) % 4), size=4, crop="random", flip=True, cache=False)


def examples(batches: Iterator[list[Batch]]) -> dict[int, tuple[bytes, int, int]]:
    """By position: the bytes of x0, label and seed. Nothing comes twice."""
    found: dict[int, tuple[bytes, int, int]] = {}
    for parts in batches:
        for x0, labels, seeds, first in parts:
            assert labels is not None
            for i in range(len(x0)):
                assert first + i not in found
                found[first + i] = (x0[i].numpy().tobytes(), int(labels[i]), int(seeds[i]))
    return found


def run(images: Images, **options: Any) -> Iterator[list[Batch]]:
    """The loader over the images' own stream."""
    return loader(images, Stream(len(images), 3), seed=SEED, **{"batch": 5, "end": 32} | options)


def rank_of(rank: int, world: int) -> Callable[[int], range]:
    """The rule of `parallel.share`, for a rank that this process is not."""
    return lambda n: range(rank * n // world, (rank + 1) * n // world)


def test_an_example_is_what_its_position_says() -> None:
    """Order, seeds and augmentation, each by its own function."""
    images = pictures()
    indices, seeds = Stream(13, 3).indices(0, 32), example_seeds(SEED, 0, 32)
    x0, labels = images.batch(indices, seeds)
    assert labels is not None
    expected = {n: (x0[n].numpy().tobytes(), int(labels[n]), int(seeds[n])) for n in range(32)}
    assert examples(run(images)) == expected


@pytest.mark.parametrize("micro_batch", [1, 2, 7])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_and_micro_batches_share_out_the_same_examples(world: int, micro_batch: int) -> None:
    images = pictures()
    found: dict[int, tuple[bytes, int, int]] = {}
    for rank in range(world):
        lists = list(run(images, share=rank_of(rank, world), micro_batch=micro_batch))
        assert len(lists) == 7  # iterations of 5, the last of 2
        assert all(len(part.x0) <= micro_batch for parts in lists for part in parts)
        mine = examples(iter(lists))
        assert not set(mine) & set(found)
        found |= mine
    assert found == examples(run(images))


def test_a_run_goes_on_from_any_position_with_any_batch() -> None:
    images = pictures()
    whole = examples(run(images))
    assert examples(run(images, end=10)) | examples(run(images, first=10, batch=7)) == whole


def test_micro_batches_follow_each_other_and_end_with_a_rest() -> None:
    parts = next(run(pictures(), micro_batch=2))
    assert [(part.first, len(part.x0)) for part in parts] == [(0, 2), (2, 2), (4, 1)]
    assert parts[0].x0.shape == (2, 3, 4, 4)
    assert parts[0].x0.dtype == torch.float32


def test_without_an_end_there_is_none_and_without_labels_none_come() -> None:
    values = torch.arange(2, dtype=torch.uint8).reshape(2, 1, 1, 1)
    endless = loader(open_images(values), Stream(2, 0), batch=3, seed=0)
    for i in range(4):
        (part,) = next(endless)
        assert part.labels is None
        assert part.first == 3 * i


def test_a_rank_without_a_part_of_the_last_iteration_gets_none() -> None:
    """2 images for 4 ranks: 0, 1, 0, 1 of them."""
    lists = [list(run(pictures(), end=2, share=rank_of(rank, 4))) for rank in range(4)]
    assert [[len(parts) for parts in found] for found in lists] == [[0], [1], [0], [1]]


class Failing(Images):
    """Refuses one image, with an error that cannot travel between processes."""

    shape = (1, 1, 1)

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, None]:
        if 3 in indices:
            raise self.error("image 3 is not there")
        return torch.zeros(len(indices), 1, 1, 1), None


def test_a_class_of_ones_own_needs_a_shape_a_length_and_a_batch() -> None:
    images = Failing(ValueError)
    training, kept = split(images, 1)
    assert training.batch(torch.tensor([0]))[0].shape == (1, 1, 1, 1)
    assert images.labels is images.classes is kept.labels is None
    assert images.fingerprint == Failing(OSError).fingerprint != kept.fingerprint


def local_error() -> type[Exception]:
    class Unpicklable(Exception):
        pass

    return Unpicklable


@pytest.mark.full
def test_workers_fetch_the_same_and_end() -> None:
    images = pictures()
    here = examples(run(images, micro_batch=2))
    for workers in (1, 2):
        assert examples(run(images, micro_batch=2, workers=workers)) == here
    endless = run(images, workers=2, end=None)
    assert [part.first for part in next(endless)] == [0]
    children = children_of(os.getpid())
    assert len(children) >= 2
    os.kill(children[0], signal.SIGINT)  # Ctrl-C on a terminal: theirs to ignore
    assert [part.first for part in next(endless)] == [5]
    endless.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 10
    while set(children) & set(children_of(os.getpid())):
        assert time.monotonic() < deadline, "workers outlive their loader"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Processes that this one started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_for_a_gpu_lie_in_pinned_memory(workers: int) -> None:
    part = next(run(pictures(), workers=workers, pin=True))[0]
    assert part.labels is not None
    assert part.x0.is_pinned()
    assert part.labels.is_pinned()
    assert part.seeds.is_pinned()
    assert (part.first, len(part.x0)) == (0, 5)


@pytest.mark.full
def test_an_error_of_a_worker_is_raised_as_it_is_in_its_turn() -> None:
    def batches(error: type[Exception], workers: int) -> Iterator[list[Batch]]:
        return loader(Failing(error), Stream(4, 0, shuffle=False), batch=1, seed=0, workers=workers)

    for workers in (0, 1):
        found = batches(ValueError, workers)
        assert [next(found)[0].first for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match=r"^image 3 is not there$"):
            next(found)
    with pytest.raises(RuntimeError, match=r"^Unpicklable: image 3 is not there$"):
        list(batches(local_error(), 1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"first": -1}, "first must be an integer of at least 0, got -1"),
        ({"micro_batch": 0}, "micro_batch must be an integer of at least 1, got 0"),
        ({"workers": -1}, "workers must be an integer of at least 0, got -1"),
        ({"prefetch": 0}, "prefetch must be an integer of at least 1, got 0"),
        ({"first": 8, "end": 7}, "end must be an integer of at least 8, got 7"),
        ({"seed": 0.5}, "seed must be an integer of 64 bits, got 0.5"),
    ],
)
def test_the_loader_says_what_is_wrong_before_it_is_read(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        loader(pictures(), Stream(13, 0), **{"batch": 4, "seed": 0} | options)


def test_a_stream_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stream must have the 13 examples of images, got 12$"):
        loader(pictures(), Stream(12, 0), batch=1, seed=0)
