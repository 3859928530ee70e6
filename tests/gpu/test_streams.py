"""Kernels run on torch's current stream, and the host never waits for them."""

from __future__ import annotations

import pytest
from gpu import checks_runs as checks
from gpu.harness import Target

pytestmark = pytest.mark.gpu
ops = pytest.mark.parametrize("op", checks.STREAM_JOBS)


@ops
def test_side_stream(gpu: Target, op: str) -> None:
    checks.check_side_stream(gpu, op)


@ops
def test_no_synchronisation(gpu: Target, op: str) -> None:
    checks.check_no_sync(gpu, op)


def test_training_never_waits(gpu: Target) -> None:
    checks.check_training_never_waits(gpu)
