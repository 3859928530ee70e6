"""What the tests of `patch` share: a network, a run of the stub's diffusion, modules made up."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from mini_guided_diffusion import unet
from torch import Tensor

SHAPE = (2, 3, 4, 4)


def net(**options: Any) -> Any:
    torch.manual_seed(0)
    return unet.Net(**options)


def run(diffusion: Any, model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The images of a whole loop and where the generator is left."""
    torch.manual_seed(4)
    return diffusion.p_sample_loop(model, SHAPE, device="cpu", **options), torch.rand(2)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max())


def cond_fn(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
    return 0.3 * torch.cos(x)


def module_with(**attributes: Any) -> ModuleType:
    module = ModuleType("another_fork")
    for name, value in attributes.items():
        setattr(module, name, value)
    return module
