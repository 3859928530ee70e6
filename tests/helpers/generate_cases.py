"""Small models to generate with, and ranks that take turns in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern import parallel
from diffkern.nn import UNet, UNetConfig

Found = TypeVar("Found")


class Elementwise(nn.Module):
    """A network whose bits cannot depend on the batch: every element by itself."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 0.25 * x if cond is None else 0.25 * x + 0.01 * cond.reshape(-1, 1, 1, 1)


def elementwise(schedule: Any = None) -> diffkern.Diffusion:
    return diffkern.Diffusion(Elementwise(), schedule or diffkern.cosine(100), shape=(1, 4, 4))


def small_unet(**options: Any) -> diffkern.Diffusion:
    """A tiny network of three classes whose output is not zero, as a fresh one's is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UNetConfig(
            **{
                "image_size": 8,
                "channels": 8,
                "multipliers": (1,),
                "blocks": 1,
                "attention_levels": (),
                "heads": 1,
                "embedding": 16,
            }
            | {"classes": 3}
            | options
        )
        network = UNet(config)
        for parameter in network.parameters():
            parameter.data = 0.1 * torch.randn_like(parameter)
    return diffkern.Diffusion(network, diffkern.cosine(100)).eval()


def in_turn(patch: pytest.MonkeyPatch, world: int, call: Callable[[], Found]) -> list[Found]:
    """What the call returns in each rank of a job of ``world``, one rank after the other; what is gathered is the main
    rank's."""
    said: list[list[Any]] = []
    found = []
    for rank in range(world):
        calls = iter(range(1000))

        def gathered(value: Any, rank: int = rank, calls: Any = calls) -> list[Any]:
            i = next(calls)
            if rank == 0:
                said.append([value] * world)
            return said[i]

        with patch.context() as ranks:
            ranks.setattr(parallel, "rank", lambda rank=rank: rank)
            ranks.setattr(parallel, "world", lambda: world)
            ranks.setattr(parallel, "gathered", gathered)
            ranks.setattr(parallel, "barrier", lambda: None)
            found.append(call())
    return found


def blobs(path: Path) -> None:
    """60 images [1, 8, 8] of three classes, 30, 20 and 10, in a .npz: a square that stands elsewhere in each."""
    labels = np.repeat([0, 1, 2], [30, 20, 10])
    images = np.random.default_rng(0).integers(0, 60, (60, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3, 2:6] += 150
    np.savez(path, images=images, labels=labels)
