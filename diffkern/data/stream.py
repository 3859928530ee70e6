"""The order in which a run sees its examples, and their seeds: functions of a position, so that a run can begin
anywhere and be split among any number of processes."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern import ops
from diffkern.integers import integer

__all__ = ["Stream", "example_seeds"]

_EPOCHS = 1 << 62
"""The seeds of epochs are those of positions from here on, where no example is."""


class Stream:
    """The endless order of the examples 0 .. count - 1: position n of the run -> the index of an example.

    Epoch e has the positions e count .. (e + 1) count - 1 and every example once. Its order is that of the random
    numbers `ops.seeds` (k_e, count), where k_e belongs to (seed, e) alone; without ``shuffle`` it is 0, 1, ... A batch
    that ends in the next epoch goes on there: no position is lost. Integer arithmetic throughout: the same order on
    every machine.
    """

    def __init__(self, count: int, seed: int = 0, shuffle: bool = True) -> None:
        self.count = integer("count", count)
        self.seed = integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits")
        self.shuffle = shuffle
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def indices(self, first: int, n: int) -> Tensor:
        """The examples at positions first .. first + n - 1, int64 [n]."""
        first, n = integer("first", first, 0, _EPOCHS - 1), integer("n", n, 0)
        parts = []
        while n > 0:
            epoch, start = divmod(first, self.count)
            parts.append(self._epoch(epoch)[start : start + n])
            first, n = first + len(parts[-1]), n - len(parts[-1])
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _epoch(self, epoch: int) -> Tensor:
        if self._order[0] != epoch:
            if self.shuffle:
                key = int(ops.seeds(self.seed, 1, _EPOCHS + epoch))
                order = torch.argsort(ops.seeds(key, self.count), stable=True)
            else:
                order = torch.arange(self.count)
            self._order = (epoch, order)
        return self._order[1]


def example_seeds(seed: int, first: int, n: int) -> Tensor:
    """The seeds of the examples at positions first .. first + n - 1 of a run, int64 [n]: `ops.seeds`.

    All that is random about an example (its time, its noise, its flip) is made of its seed.
    """
    return ops.seeds(seed, n, first)
