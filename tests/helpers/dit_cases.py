"""A small DiT whose output is not 0, and what goes into it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.nn import DiT, DiTConfig

SMALL = DiTConfig(image_size=8, width=16, depth=2, heads=2, classes=5, time_channels=16)


def small(**fields: Any) -> DiTConfig:
    return dataclasses.replace(SMALL, **fields)


def awake(module: nn.Module, seed: int = 1) -> Any:
    """The module with all its parameters random, as its gates start at zero; for evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return module.eval()


def dit(seed: int = 0, **fields: Any) -> DiT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: DiT = awake(DiT(small(**fields)))
    return model


def inputs(batch: int = 3, config: DiTConfig = SMALL) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, config.in_channels, *config.size, generator=generator)
    return x, torch.arange(batch) * 300 + 7, torch.arange(batch) * 2 % (config.classes + 1)
