"""`sample` on a GPU: the images of the CPU, a loop that allocates nothing and never waits."""

from __future__ import annotations

import pytest
import torch
from gpu import checks_runs as checks
from gpu.calls import DTYPES
from gpu.harness import Target

pytestmark = pytest.mark.gpu
plans = pytest.mark.parametrize("name", checks.PLANS)


@plans
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_of_the_cpu(gpu: Target, name: str, dtype: torch.dtype) -> None:
    checks.check_sampling(gpu, name, dtype)


def test_channels_last(gpu: Target) -> None:
    checks.check_layout_of_sampling(gpu)


@pytest.mark.parametrize("name", ["ddpm", "heun", "euler flow", "ddpm learned", "ddim threshold"])
def test_a_start_for_each_sample(gpu: Target, name: str) -> None:
    checks.check_starts(gpu, name)


@pytest.mark.parametrize(("name", "option"), checks.LEAN)
def test_the_loop_allocates_nothing_and_never_waits(gpu: Target, name: str, option: str) -> None:
    checks.check_loop_is_lean(gpu, name, option)
