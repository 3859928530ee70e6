"""Attention on a GPU: as near to float64 as plain PyTorch, the same bits for any batch, graphs, streams, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu import checks_attention as checks
from gpu.harness import Target
from helpers.attention_cases import DTYPES, FORMATS

pytestmark = pytest.mark.gpu


def skip_unsupported(gpu: Target, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(gpu.device) < (8, 0):
        pytest.skip("bfloat16 needs compute capability 8.0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(gpu: Target, dtype: torch.dtype) -> None:
    skip_unsupported(gpu, dtype)
    checks.check_attention(gpu, dtype)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spatial(gpu: Target, dtype: torch.dtype, form: str) -> None:
    skip_unsupported(gpu, dtype)
    checks.check_spatial(gpu, dtype, form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_repetition_change_no_bit(gpu: Target, dtype: torch.dtype) -> None:
    skip_unsupported(gpu, dtype)
    checks.check_batch_and_repetition(gpu, dtype)


def test_graphs(gpu: Target) -> None:
    checks.check_graphs(gpu)


def test_streams(gpu: Target) -> None:
    checks.check_streams(gpu)


def test_limits(gpu: Target) -> None:
    checks.check_limits(gpu)


def test_cpu_and_gpu_do_not_mix(gpu: Target) -> None:
    checks.check_devices_do_not_mix(gpu, torch.device("cpu"))


@pytest.mark.parametrize("options", [{"backend": "aot_eager"}, {"backend": "inductor"}], ids=["aot_eager", "inductor"])
def test_compile(gpu: Target, options: dict[str, Any]) -> None:
    checks.check_compile(gpu, **options)


def test_opcheck(gpu: Target) -> None:
    checks.check_opcheck(gpu)
