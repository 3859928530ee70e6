"""A mask of integers or bools means the same wherever one is given: not 0."""

from __future__ import annotations

import pytest
import torch
from helpers.diffusers_peers import ours
from torch import Tensor

import diffkern

SHAPE = (2, 3, 4, 5)


def draw(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


OPEN = draw(1) > 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64], ids=str)
def test_repaint(dtype: torch.dtype) -> None:
    """diffusers' scheduler blends by the number itself, so that 255 is no mask there; here it is 1."""
    scheduler = ours.RePaintScheduler(eta=0.7)
    scheduler.set_timesteps(20)
    found = [
        scheduler.step(draw(2), 500, draw(3), draw(4), mask, torch.Generator().manual_seed(5)).prev_sample
        for mask in (OPEN if dtype == torch.bool else (255 * OPEN).to(dtype), OPEN.float())
    ]
    assert torch.equal(*found)


def test_sample() -> None:
    plan = diffkern.ddim(diffkern.linear(), 4)
    masks = [OPEN, 255 * OPEN.to(torch.uint8), OPEN.float()]
    seeds = diffkern.seeds(0, 2)
    found = [
        diffkern.sample(lambda x, t: 0.1 * x, draw(2), plan, mask=mask, known=draw(3), seeds=seeds) for mask in masks
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
