"""What the host cannot see without waiting: NaN on the device, an error in checked mode."""

from __future__ import annotations

import pytest
from gpu import checks_ops as checks
from gpu.harness import Target

pytestmark = pytest.mark.gpu


def test_index_outside_the_table_is_nan(gpu: Target) -> None:
    checks.check_index_outside(gpu)


def test_missing_operand_is_nan(gpu: Target) -> None:
    checks.check_operand_missing(gpu)


def test_checked_mode_raises(gpu: Target) -> None:
    checks.check_checked_mode(gpu)


def test_empty_batches(gpu: Target) -> None:
    checks.check_empty_batch(gpu)
