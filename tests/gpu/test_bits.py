"""Noise, noising, step and loss: the bits of the CPU, in every dtype, layout and with every option."""

from __future__ import annotations

import pytest
import torch
from gpu import checks_ops as checks
from gpu import checks_runs
from gpu.calls import DTYPES, INPUT_LAYOUTS
from gpu.harness import Target

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layouts = pytest.mark.parametrize("layout", INPUT_LAYOUTS)


@dtypes
def test_randn(gpu: Target, dtype: torch.dtype) -> None:
    checks.check_randn(gpu, dtype)


@dtypes
def test_noise_sum(gpu: Target, dtype: torch.dtype) -> None:
    checks.check_noise_sum(gpu, dtype)


@dtypes
@layouts
def test_noising(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_noising(gpu, dtype, layout)


@dtypes
@layouts
def test_loss(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_loss(gpu, dtype, layout)


@dtypes
@layouts
def test_variational(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_variational(gpu, dtype, layout)


@dtypes
@layouts
def test_statistics(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_statistics(gpu, dtype, layout)


@dtypes
@layouts
def test_group_norm(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_group_norm(gpu, dtype, layout)


@dtypes
@layouts
def test_linear_rows(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_linear_rows(gpu, dtype, layout)


@dtypes
@layouts
def test_step(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_step(gpu, dtype, layout)


@dtypes
@layouts
def test_learned_step(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_learned_step(gpu, dtype, layout)


@dtypes
@layouts
def test_step_logprob(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_step_logprob(gpu, dtype, layout)


@dtypes
def test_mixed_rows_special_values_and_large_batches(gpu: Target, dtype: torch.dtype) -> None:
    checks.check_mixed_rows(gpu, dtype)


@dtypes
@layouts
def test_out_variants_write_their_output_only(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_out(gpu, dtype, layout)


@dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "misaligned"])
def test_in_place(gpu: Target, dtype: torch.dtype, layout: str) -> None:
    checks.check_in_place(gpu, dtype, layout)


@dtypes
def test_gradients(gpu: Target, dtype: torch.dtype) -> None:
    checks.check_gradients(gpu, dtype)


def test_training(gpu: Target) -> None:
    checks_runs.check_training(gpu)


@pytest.mark.full
def test_more_than_2_to_the_31_elements(gpu: Target) -> None:
    count = 2**31 + 1021
    free = torch.cuda.mem_get_info(gpu.device)[0]
    if free < 3 * count:
        pytest.skip(f"needs {3 * count / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.1f}")
    checks.check_far_elements(gpu, count)
