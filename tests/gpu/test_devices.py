"""Several devices: an op runs on the GPU of its tensors, leaves the current one alone, and mixes no devices."""

from __future__ import annotations

import pytest
import torch
from gpu import checks_ops, checks_runs
from gpu.harness import Target

pytestmark = pytest.mark.gpu


def test_cpu_and_gpu_do_not_mix(gpu: Target) -> None:
    checks_ops.check_devices_do_not_mix(gpu, torch.device("cpu"))


def test_two_gpus_do_not_mix(gpu: Target, second_gpu: Target) -> None:
    checks_ops.check_devices_do_not_mix(gpu, second_gpu.device)
    checks_ops.check_devices_do_not_mix(second_gpu, gpu.device)


@pytest.mark.parametrize("op", checks_runs.STREAM_JOBS)
def test_not_the_current_gpu(gpu: Target, second_gpu: Target, op: str) -> None:
    """On the current stream of the tensors' GPU, which is not the current GPU and stays so."""
    checks_runs.check_device_guard(second_gpu, gpu, op)
