"""What bounds the ratios of large steps: states read and written, by the original's step and by ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.diffusers_peers import pair, scaled
from helpers.lazy import needs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = needs("diffusers")

SHAPE = (1, 4, 64, 64)
STATE = 4 * 64 * 64
COUNTS = {  # as docs/compat-diffusers.md has them
    "DDIMScheduler": (16.0, 4.0),
    "DDIMInverseScheduler": (16.0, 4.0),
    "EulerDiscreteScheduler": (17.0, 5.0),
    "EDMEulerScheduler": (19.0, 5.0),
    "HeunDiscreteScheduler": (19.5, 6.5),
    "FlowMatchEulerDiscreteScheduler": (5.0, 3.0),
    "FlowMatchHeunDiscreteScheduler": (17.5, 4.5),
    "DPMSolverMultistepScheduler": (24.0, 5.0),
    "UniPCMultistepScheduler": (57.0, 6.0),
}


class States(TorchDispatchMode):
    """``count``: float32 states (our table is float64) that ops read or write, however stacked; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = (
            [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.numel() >= STATE and t.dtype == torch.float32]
            for tree in ((args, kwargs), result)
        )
        known = {t.data_ptr() for t in read}
        if any(t.data_ptr() not in known for t in made):
            self.count += sum(t.numel() // STATE for t in (*read, *made))
        return result


@pytest.mark.parametrize("name", COUNTS)
def test_states_moved_by_a_step(name: str) -> None:
    """In the middle of a loop, the mean of two calls; `scale_model_input` counts too."""
    found = []
    for scheduler in pair(name, {}, 12):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        m, moved = 0.5 * torch.ones(SHAPE), 0
        for i, t in enumerate(scheduler.timesteps[:8]):
            with States() as states:
                scaled(scheduler, x, t)
                x = scheduler.step(m, t, x, return_dict=False)[0]
            moved += states.count if i >= 6 else 0
        found.append(moved / 2)
    assert tuple(found) == COUNTS[name]
