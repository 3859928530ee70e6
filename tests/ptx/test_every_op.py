"""Every CUDA op once, on one architecture: what `make test` runs of this folder. The other files are the grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import build_description
from ptx.attention_harness import Attention, random
from ptx.attention_harness import check as check_attention
from ptx.calls.group_norm import Norm, check_norm, parameters
from ptx.calls.linear_rows import Linear, check_linear
from ptx.calls.statistics import moments, quantile
from ptx.calls.whole_tiles import CASES
from ptx.harness import HERE, Cpu, Device, check

ARCH = "sm_80"
DTYPES = (torch.float32, torch.bfloat16)
SHAPE = (3, 67)  # a whole tile of no access, in one block


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_cpu(device_of: Callable[[str], Device], cpu: Cpu, name: str, dtype: torch.dtype) -> None:
    check(device_of(ARCH), cpu, CASES[name]("contiguous", SHAPE, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_have_the_bits_of_the_cpu(device_of: Callable[[str], Device], cpu: Cpu, dtype: torch.dtype) -> None:
    check(device_of(ARCH), cpu, quantile("contiguous", 2, SHAPE, dtype))
    check(device_of(ARCH), cpu, moments("contiguous", 2, SHAPE, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_rows_have_the_bits_of_the_cpu(device_of: Callable[[str], Device], cpu: Cpu, dtype: torch.dtype) -> None:
    check_linear(device_of(ARCH), cpu, Linear(5, 37, 11, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_norm_has_the_bits_of_the_cpu(device_of: Callable[[str], Device], cpu: Cpu, dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        check_norm(device_of(ARCH), cpu, Norm(layout, 2, (6, 5, 14), dtype, 3, True, parameters(2, 6, dtype)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_and_its_gradient(dtype: torch.dtype) -> None:
    names = [name for name in build_description.cuda_sources() if "attention" in name and "bf16" not in name]
    device = Attention(ARCH, files=(*names, HERE / "attention_absent.cu"))
    q, k, v, grad = (random(i, 1, 2, n, 40, dtype=dtype) for i, n in enumerate((33, 20, 20, 33)))
    first = device.forward(q, k, v)
    check_attention(first, ("out", "lse"), q, k, v, grad)
    back = device.backward(q, k, v, first.out, grad, first.lse)
    check_attention(back, ("dq", "dk", "dv"), q, k, v, grad)
