"""Batches of a run: which examples this process takes in an iteration, fetched here or in processes of their own."""

from __future__ import annotations

import functools
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import parallel
from diffkern.data.images import Images
from diffkern.data.stream import Stream, example_seeds
from diffkern.integers import integer

__all__ = ["Batch", "loader"]


class Batch(NamedTuple):
    """Examples that go through the network together."""

    x0: Tensor
    """float32 [B, C, H, W] in [-1, 1]."""
    labels: Tensor | None
    """int64 [B], or captions int64 [B, L]."""
    seeds: Tensor
    """int64 [B]: `example_seeds`."""
    first: int
    """The position of the first of them in the stream; the others follow."""


def loader(
    images: Images,
    stream: Stream,
    *,
    batch: int,
    seed: int,
    first: int = 0,
    micro_batch: int | None = None,
    share: Callable[[int], range] = parallel.share,
    workers: int = 0,
    pin: bool = False,
    prefetch: int = 2,
    end: int | None = None,
) -> Iterator[list[Batch]]:
    """The batches of this process, a list an iteration.

    An iteration has the next ``batch`` positions of the stream, from ``first`` on; of them this process takes those
    that ``share(number)`` says, cut into batches of ``micro_batch`` and a rest. Images are augmented by the seeds of
    their positions, so what an example is does not depend on batches, processes or workers. ``end``: the position to
    stop before, with a shorter last iteration where it comes to that; a process whose share of it is none gets [].

    ``workers`` processes fetch ahead, ``prefetch`` batches each, and end with the iterator (`close` does); an error of
    theirs is raised here as it is. ``pin``: into page-locked memory, where there is a GPU. Raises ValueError for
    arguments out of their range and a stream of another number of examples.
    """
    if stream.count != len(images):
        raise ValueError(f"stream must have the {len(images)} examples of images, got {stream.count}")
    batch, first = integer("batch", batch), integer("first", first, 0)
    micro = batch if micro_batch is None else integer("micro_batch", micro_batch)
    workers, prefetch = integer("workers", workers, 0), integer("prefetch", prefetch)
    if end is not None:
        end = integer("end", end, first)
    seed = integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits")
    plan = functools.partial(_iterations, batch, first, micro, share, end)
    return _lists(plan, images, stream, seed, workers, pin and torch.cuda.is_available(), prefetch)


def _iterations(
    batch: int, first: int, micro: int, share: Callable[[int], range], end: int | None
) -> Iterator[list[tuple[int, int]]]:
    """(position, number) of every batch of every iteration."""
    while end is None or first < end:
        count = batch if end is None else min(batch, end - first)
        mine = share(count)
        yield [(first + start, min(micro, mine.stop - start)) for start in range(mine.start, mine.stop, micro)]
        first += count


def _lists(
    plan: Callable[[], Iterator[list[tuple[int, int]]]],
    images: Images,
    stream: Stream,
    seed: int,
    workers: int,
    pin: bool,
    prefetch: int,
) -> Iterator[list[Batch]]:
    fetch = _Fetch(images, seed)
    keys = ((position, stream.indices(position, n)) for parts in plan() for position, n in parts)
    fetched: Iterator[Any]
    if workers == 0:
        fetched = (_pinned(fetch[key]) if pin else fetch[key] for key in keys)
    else:
        fetched = iter(
            torch.utils.data.DataLoader(
                fetch,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                prefetch_factor=prefetch,
                pin_memory=pin,
                worker_init_fn=_start,
            )
        )
    try:
        for parts in plan():
            found: list[Batch] = []
            for _ in parts:
                one = next(fetched)
                if isinstance(one, Exception):
                    raise one
                found.append(one)
            yield found
    finally:
        del fetched  # and with it the workers, also where a traceback keeps this frame


def _pinned(one: Any) -> Any:
    if isinstance(one, Batch):
        labels = None if one.labels is None else one.labels.pin_memory()
        return Batch(one.x0.pin_memory(), labels, one.seeds.pin_memory(), one.first)
    return one


class _Fetch(torch.utils.data.Dataset[Any]):
    """Batches by (position, indices); an error is a value, so that it travels between processes as it is."""

    def __init__(self, images: Images, seed: int) -> None:
        self.images = images
        self.seed = seed

    def __getitem__(self, key: tuple[int, Tensor]) -> Batch | Exception:
        first, indices = key
        try:
            seeds = example_seeds(self.seed, first, len(indices))
            x0, labels = self.images.batch(indices, seeds)
        except Exception as error:
            return error if torch.utils.data.get_worker_info() is None else _travelling(error)
        return Batch(x0, labels, seeds, first)


def _travelling(error: Exception) -> Exception:
    """The error if it can be sent to another process, or one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _start(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal: what it means is for the one that trains to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
