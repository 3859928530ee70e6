"""The GPU that the tests of this folder run on. Without one, --gpu fails at once and a plain run skips them."""

from __future__ import annotations

import pytest
import torch
from gpu.harness import Target

from diffkern._load import cuda_status


@pytest.fixture(scope="session")
def gpu() -> Target:
    """The current GPU. Fails where diffkern cannot use it, with the sentence of `python -m diffkern info`."""
    status = cuda_status()
    if not status.ready:
        pytest.fail(status.text, pytrace=False)
    return Target(torch.device("cuda", torch.cuda.current_device()))


@pytest.fixture(scope="session")
def second_gpu(gpu: Target) -> Target:
    """Another GPU than the current one; the tests that need it are skipped where there is one only."""
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two GPUs, torch sees {count}")
    return Target(torch.device("cuda", (gpu.device.index + 1) % count))
